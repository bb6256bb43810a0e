"""Tests of what these tools compute and refuse: python3 -m unittest discover tools/kernels (or: make kernels-check)."""

import unittest
from dataclasses import replace

import measure
import moves
from moves import Geometry, readable, step
from table import page, table

LOG = """ptxas info    : 364 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, 424 bytes cmem[0]
ptxas info    : Compiling entry function 'second_2' for 'sm_80'
ptxas info    : Function properties for second_2
    48 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 49153 bytes smem, 424 bytes cmem[0]
"""

BEGINNING = """.text.{name}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ULDC.64 UR6, c[0x0][0x208] ;
        /*0020*/                   S2R R2, SR_CTAID.X ;
"""
LET, WAIT = "        /*0030*/                   PREEXIT ;\n", "        /*0040*/                   ACQBULK ;\n"
LOAD = "        /*0050*/               @P0 LDG.E.CONSTANT R2, desc[UR4][R2.64] ;\n"
COHERENT = "        /*0050*/                   LDG.E.NA.128 R4, desc[UR4][R2.64] ;\n"
END = "        /*0060*/                   EXIT ;\n"
BRANCH = "        /*0070*/              @!P0 BRA `(.L_x_7) ;\n"


class Measures(unittest.TestCase):
    def test_what_ptxas_says_is_read_and_judged(self):
        first, second = measure.parse(LOG, "sm_80")
        self.assertEqual((first.name, first.registers, first.shared, first.spills), ("first", 38, 0, 0))
        self.assertEqual((second.name, second.registers, second.shared, second.spills), ("second_2", 255, 49153, 20))
        self.assertEqual(measure.failures([first]), [])
        spills, shared = measure.failures([first, second])
        self.assertEqual(spills, "second_2 spills 20 bytes of registers on sm_80")
        self.assertEqual(shared, "second_2 has 49153 bytes of shared memory on sm_80, 49152 at most")
        self.assertEqual(measure.failures([replace(second, spills=0, shared=48 << 10)]), [])

    def test_a_kernel_begins_by_waiting(self):
        beginnings = {
            "right": LET + WAIT + LOAD + END,
            "never": LET + LOAD + END,
            "late": LET + LOAD + WAIT + END,
            "alone": WAIT + LOAD + END,
            "around": LET + BRANCH + WAIT + LOAD + END,
            "ended": LET + END + WAIT + LOAD,
            "last": LET + WAIT + END,
        }
        listing = "".join(BEGINNING.format(name=name) + code for name, code in beginnings.items())
        self.assertEqual(measure.without_wait(listing), ["never", "late", "alone", "around", "ended"])

    def test_loads_are_coherent_but_those_of_constants(self):
        bodies = {"right": COHERENT, "wrong": COHERENT + LOAD, "rotate_and_store": LOAD}
        listing = "".join(BEGINNING.format(name=name) + LET + WAIT + code + END for name, code in bodies.items())
        self.assertEqual(measure.incoherent(listing), ["wrong"])


class Bytes(unittest.TestCase):
    def test_products_move_their_weights_and_a_little_more(self):
        geometry = Geometry()
        # Two experts of three matrices in each of 28 layers.
        of_experts = 28 * 2 * 3 * 3072 * 24576
        for format, bytes in (("bf16", 2), ("f32", 4), ("int8", 1.0625), ("int4", 0.5625)):
            moved, least = map(sum, zip(step(f"gate_up_{format}"), step(f"down_{format}")))
            self.assertGreater(least, of_experts * bytes)
            self.assertLess(least, of_experts * bytes * 1.002)
            # A block reads activations for sixteen rows of weights, or for two times sixteen.
            activation = moves.TILED_BYTES[format]
            again = 28 * 2 * (3072 * activation * (24576 / 16 - 1) + 24576 * activation * (3072 / 16 - 1))
            self.assertEqual(moved - least, again)
        self.assertEqual(step("gate_up_tensor_bf16")[1] - step("gate_up_bf16")[1], -28 * 2 * 3072 * 2)

    def test_dense_products_are_those_of_a_layer_and_the_head(self):
        weights = 28 * (3072 * 3 * 4096 + 4096 * 3072) + 256_000 * 3072
        results = 28 * (3 * 4096 * 4 + 3072 * 8) + 256_000 * 4
        activations = 28 * (3072 + 4096) * 4 + 3072 * 4
        self.assertEqual(step("matmul_bf16")[1], 2 * weights + results + activations)

    def test_attention_reads_its_context_once_a_head(self):
        cache = 28 * 2 * 4096 * 16 * 256 * 2
        moved, least = step("attention")
        self.assertEqual(moved, least)
        states = 28 * 16 * 16 * 258 * 4
        self.assertEqual(moved, cache + states + 28 * 16 * 256 * 4)
        shared = replace(Geometry(), key_value_heads=1)
        moved, least = step("attention", shared)
        self.assertEqual(moved - least, cache * 15 / 16)
        self.assertEqual(step("attention_merge")[0], states + 28 * 4096 * 4)

    def test_the_small_ones(self):
        self.assertEqual(step("norm"), (57 * 12 * 3072,) * 2)
        self.assertEqual(step("embed"), (16 * 3072 + 4 * 3072, 6 * 3072))
        self.assertEqual(step("combine"), (28 * 16 * 3072,) * 2)
        self.assertEqual(step("log_softmax_at"), (2_048_000, 1_024_000))
        self.assertEqual(step("route", replace(Geometry(), experts=3))[0], step("route")[0])
        self.assertLess(step("route", replace(Geometry(), experts=3))[1], step("route")[1])
        self.assertEqual(step("group"), (28 * 52, 28 * 44))

    def test_training_reads_a_layers_weights_twice_on_the_way_up_and_once_on_the_way_down(self):
        of_layer = 4 * 4096 * 3072 + 2 * 3 * 3072 * 24576
        weights = 2 * (28 * of_layer + 256_000 * 3072)
        activations = 2 * (28 * (3072 + 4096 + 2 * (3072 + 24576)) + 3072)
        results = 2 * (28 * (3 * 4096 + 3072 + 2 * (2 * 24576 + 3072)) + 256_000)
        self.assertEqual(step("training_product_bf16")[1], 2 * weights + 4 * activations + 8 * results)
        weights = 27 * of_layer + 256_000 * 3072
        gradients = 27 * (3 * 4096 + 3072 + 2 * (2 * 24576 + 3072)) + 256_000
        results = 27 * (3072 + 4096 + 2 * (3072 + 24576)) + 3072
        self.assertEqual(step("training_product_gradient_bf16")[1], 2 * weights + 4 * gradients + 8 * results)

    def test_no_kernel_moves_less_than_it_must(self):
        for family, of_family in moves.MOVES.items():
            names = [f"{family}_{format}" for format in moves.WEIGHT_BYTES] if of_family.rows_of_block else [family]
            for name in names:
                moved, least = step(name)
                self.assertGreaterEqual(moved, least, name)
                alike = family in ("attention", "attention_tensor", "route")
                self.assertEqual(moved == least, of_family.least == "the same" or alike, name)

    def test_a_kernel_that_has_no_formula_is_named(self):
        with self.assertRaisesRegex(SystemExit, "attention_sparse_f32: tools/kernels/moves.py does not say"):
            step("attention_sparse_f32")

    def test_bytes_are_readable(self):
        found = [readable(count) for count in (44, 999, 1456, 12_340, 999_700, 1_890_000_000, 16.94e9)]
        expected = ["44 B", "999 B", "1.46 kB", "12.3 kB", "1 MB", "1.89 GB", "16.9 GB"]
        self.assertEqual(found, expected)


class Table(unittest.TestCase):
    def test_tiles_of_one_kernel_are_one_row(self):
        kernel = lambda name, registers: measure.Kernel(name, "sm_80", registers, 64, 0)
        text = table([kernel("down_int4_4", 4), kernel("norm", 9), kernel("down_int4_1", 1)], ["sm_80"])
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        self.assertEqual([row[:4] for row in rows[2:]], [["`norm`", "9", "64", "0"], ["`down_int4`", "1, 4", "64", "0"]])
        self.assertEqual(rows[2][-2:], ["2.1 MB", "2.1 MB"])

    def test_a_page_keeps_what_is_before_its_table(self):
        self.assertEqual(page("# Kernels\n\n| kernel | old |\n", "| kernel | new |\n"), "# Kernels\n\n| kernel | new |\n")
        with self.assertRaises(SystemExit):
            page("# Kernels\n", "")


if __name__ == "__main__":
    unittest.main()
