// Weights in panels (quant/panels.rs has the layout): what a word of each format is, and what it meets.
//
// A panel is sixteen rows. Its lines of 64 bytes have a word of four bytes for each row, COLUMNS columns of it. Formats
// with scales have one of two bytes for each row and group of columns.

#pragma once

#include "simt.cuh"

constexpr uint32_t PANEL_ROWS = 16;
constexpr uint32_t LINE_BYTES = 64;
// Columns of activations that share a scale; a group of weights is one or more of them.
constexpr uint32_t BLOCK_SHIFT = 5;

// One panel of a matrix.
struct Panel {
    const uint8_t *lines;
    // `[groups][16 rows]` of two bytes; nothing in formats without.
    const uint8_t *scales;
    uint32_t line_count;
    uint32_t group_shift;
    bool half_scales;
};

DEVICE uint32_t panel_count(const MatrixArguments &matrix) { return (matrix.rows + PANEL_ROWS - 1) / PANEL_ROWS; }

template <class Format> DEVICE Panel panel_of(const MatrixArguments &matrix, uint32_t index) {
    Panel panel;
    panel.line_count = matrix.columns / Format::COLUMNS;
    panel.group_shift = matrix.group_shift + BLOCK_SHIFT;
    panel.half_scales = matrix.half_scales != 0;
    panel.lines = matrix.lines + static_cast<size_t>(index) * panel.line_count * LINE_BYTES;
    panel.scales = nullptr;
    if (Format::SCALED) {
        size_t groups = matrix.columns >> panel.group_shift;
        panel.scales = matrix.scales + index * groups * (2 * PANEL_ROWS);
    }
    return panel;
}

DEVICE float wide_scale(const Panel &panel, uint32_t bits) {
    uint16_t half = static_cast<uint16_t>(bits);
    return panel.half_scales ? f16_to_float(half) : bf16_to_float(half);
}

// The scale of one row at one column.
template <class Format> DEVICE float scale_of(const Panel &panel, uint32_t column, uint32_t row) {
    if (!Format::SCALED) {
        return 1.0f;
    }
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(panel.scales);
    return wide_scale(panel, scales[(column >> panel.group_shift) * PANEL_ROWS + row]);
}

struct FourScales {
    float row[4];
};

// The scales of rows 4 * quarter and on, at one column, as they are stored.
DEVICE TwoWords four_scale_bits(const Panel &panel, uint32_t column, uint32_t quarter) {
    size_t offset = static_cast<size_t>(column >> panel.group_shift) * (2 * PANEL_ROWS) + 8 * quarter;
    return *reinterpret_cast<const TwoWords *>(panel.scales + offset);
}

DEVICE FourScales wide_scales(const Panel &panel, TwoWords bits) {
    FourScales scales;
    for (uint32_t row = 0; row < 4; row++) {
        scales.row[row] = wide_scale(panel, bits.word[row / 2] >> 16 * (row % 2));
    }
    return scales;
}

template <class Format> DEVICE FourScales four_scales(const Panel &panel, uint32_t column, uint32_t quarter) {
    if (!Format::SCALED) {
        return FourScales{{1.0f, 1.0f, 1.0f, 1.0f}};
    }
    return wide_scales(panel, four_scale_bits(panel, column, quarter));
}

// Each format has: COLUMNS of a word; SCALED, whether there are scales and activations are in int8; Weights, a word
// made ready, what all tokens share; Input, a line's columns of a token; `add`, sum + Weights . Input; `number`, one
// column as it is.

struct F32 {
    static constexpr uint32_t COLUMNS = 1;
    static constexpr bool SCALED = false;

    struct Weights {
        float number;
    };
    struct Input {
        float number;
    };

    static DEVICE Weights weights(uint32_t word) { return Weights{float_of_bits(word)}; }
    static DEVICE Input input(const ActivationArguments &x, size_t start, uint32_t line) {
        return Input{x.numbers[start + line]};
    }
    static DEVICE float add(float sum, Weights weights, float, Input x) {
        return multiply_add(weights.number, x.number, sum);
    }
    static DEVICE float number(uint32_t word, uint32_t) { return float_of_bits(word); }
};

// What bf16 and f16 share: two columns, the lower half of the word first.
template <class Half> struct Halves {
    static constexpr uint32_t COLUMNS = 2;
    static constexpr bool SCALED = false;

    struct Weights {
        float number[2];
    };
    typedef TwoFloats Input;

    static DEVICE Weights weights(uint32_t word) { return Weights{{number(word, 0), number(word, 1)}}; }
    static DEVICE Input input(const ActivationArguments &x, size_t start, uint32_t line) {
        return *reinterpret_cast<const TwoFloats *>(x.numbers + start + 2 * line);
    }
    static DEVICE float add(float sum, Weights weights, float, Input x) {
        sum = multiply_add(weights.number[0], x.number[0], sum);
        return multiply_add(weights.number[1], x.number[1], sum);
    }
    static DEVICE float number(uint32_t word, uint32_t column) {
        return Half::wide(static_cast<uint16_t>(word >> 16 * column));
    }
};

struct WideBf16 {
    static DEVICE float wide(uint16_t bits) { return bf16_to_float(bits); }
};
struct WideF16 {
    static DEVICE float wide(uint16_t bits) { return f16_to_float(bits); }
};
typedef Halves<WideBf16> Bf16;
typedef Halves<WideF16> F16;

// The block of activations that a column of a row is in.
DEVICE const BlockArguments &block_of(const ActivationArguments &x, size_t start, uint32_t column) {
    return x.blocks[(start + column) >> BLOCK_SHIFT];
}

// Four bytes, each 128 too high.
struct Int8 {
    static constexpr uint32_t COLUMNS = 4;
    static constexpr bool SCALED = true;

    struct Weights {
        uint32_t signed_bytes;
    };
    struct Input {
        uint32_t word;
        float scale;
    };

    static DEVICE Weights weights(uint32_t word) { return Weights{word ^ 0x80808080}; }
    static DEVICE Input input(const ActivationArguments &x, size_t start, uint32_t line) {
        return Input{x.integers[start / 4 + line], block_of(x, start, 4 * line).scale};
    }
    static DEVICE float add(float sum, Weights weights, float scale, Input x) {
        float product = static_cast<float>(dot4(0, weights.signed_bytes, x.word));
        return multiply_add(product, scale * x.scale, sum);
    }
    static DEVICE float number(uint32_t word, uint32_t column) {
        return static_cast<float>(static_cast<int32_t>(word >> 8 * column & 0xff) - 128);
    }
};

// Eight halves of bytes, each 8 too high: columns 0 to 3 are the low ones, 4 to 7 the high ones. Turned, they are the
// high halves of signed bytes, which makes each sixteen times what it is.
struct Int4 {
    static constexpr uint32_t COLUMNS = 8;
    static constexpr bool SCALED = true;

    struct Weights {
        uint32_t low;
        uint32_t high;
    };
    struct Input {
        TwoWords words;
        float scale;
    };

    static DEVICE Weights weights(uint32_t word) {
        return Weights{(word << 4 & 0xf0f0f0f0) ^ 0x80808080, (word & 0xf0f0f0f0) ^ 0x80808080};
    }
    static DEVICE Input input(const ActivationArguments &x, size_t start, uint32_t line) {
        const TwoWords *words = reinterpret_cast<const TwoWords *>(x.integers + start / 4);
        return Input{words[line], block_of(x, start, 8 * line).scale};
    }
    static DEVICE float add(float sum, Weights weights, float scale, Input x) {
        int32_t sixteenfold = dot4(dot4(0, weights.low, x.words.word[0]), weights.high, x.words.word[1]);
        return multiply_add(static_cast<float>(sixteenfold >> 4), scale * x.scale, sum);
    }
    static DEVICE float number(uint32_t word, uint32_t column) {
        uint32_t shift = 8 * (column % 4) + 4 * (column / 4);
        return static_cast<float>(static_cast<int32_t>(word >> shift & 0xf) - 8);
    }
};
