//! Hosts written in C, compiled as C99 and as C++11 with every warning an error, linked with the shared and with the
//! static library, and run. What they check is in `tests/hosts/*.c`.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::collections::BTreeSet;
use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Directory, library_directory, repository};
use gemmoe::{RouterPatch, ffi};
use serde_json::json;
use tempfile::TempDir;

/// The languages every host is compiled as.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Language {
    C99,
    Cpp11,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Library {
    Shared,
    Static,
}

/// Every way to build a host; without a C++ compiler those of C.
fn ways() -> Vec<(Language, Library)> {
    let mut ways = vec![(Language::C99, Library::Shared), (Language::C99, Library::Static)];
    match is_installed("c++") {
        true => ways.extend([(Language::Cpp11, Library::Shared), (Language::Cpp11, Library::Static)]),
        false => println!("no C++ compiler: hosts are compiled as C only"),
    }
    ways
}

fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Hosts that do everything wrong.
const MISUSE: [&str; 4] = ["misuse.c", "misuse_text.c", "misuse_session.c", "misuse_train.c"];

/// The examples beside the hosts of the tests.
const CHAT: &str = "../../examples/c/chat.c";
const GAME_LOOP: &str = "../../examples/c/game_loop.c";
const TRAIN: &str = "../../examples/c/train.c";

fn compile(source: &str, language: Language, library: Library, target: &Path) {
    let (compiler, standard) = match language {
        Language::C99 => ("cc", &["-x", "c", "-std=c99"]),
        Language::Cpp11 => ("c++", &["-x", "c++", "-std=c++11"]),
    };
    let libraries = library_directory();
    let mut command = Command::new(compiler);
    command.args(standard).args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"]);
    command.arg("-I").arg(repository().join("include")).arg(repository().join("tests/hosts").join(source));
    command.args(["-x", "none"]);
    match library {
        Library::Shared => {
            command.arg(libraries.join("libgemmoe.so")).arg(format!("-Wl,-rpath,{}", libraries.display()));
        }
        Library::Static => drop(command.arg(libraries.join("libgemmoe.a"))),
    }
    command.args(["-lpthread", "-ldl", "-lm", "-lgcc_s", "-o"]).arg(target);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{source} as {language:?}, {library:?}:\n{}", text(&output));
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Model directories, and a place for programs.
struct Workshop {
    with_tokenizer: TempDir,
    without_tokenizer: TempDir,
    broken: TempDir,
    /// With a chat template that never ends, that is cut off, that refuses everything.
    templates: [TempDir; 3],
    programs: TempDir,
    /// A training recipe and its data.
    training: TempDir,
}

/// Writes a training recipe of the model, and rows that it learns from.
fn write_training(directory: &Path, model: &Path) {
    let rows = |range: std::ops::Range<usize>| -> String {
        range
            .map(|row| format!("{{\"prompt\": \"hello {row}\", \"response\": \"ell hello ho {}\"}}\n", row % 3))
            .collect()
    };
    std::fs::write(directory.join("rows.jsonl"), rows(0..12)).unwrap();
    std::fs::write(directory.join("held_out.jsonl"), rows(12..16)).unwrap();
    let recipe = format!(
        "model = {:?}\n[data]\nfiles = [\"rows.jsonl\"]\nheld_out = [\"held_out.jsonl\"]\nmax_tokens = 96\n\
         [train]\nepochs = 2\nrows_per_step = 4\nlearning_rate = 0.02\n",
        model.display().to_string()
    );
    std::fs::write(directory.join("recipe.toml"), recipe).unwrap();
}

impl Workshop {
    fn new() -> Workshop {
        let sizes = json!({"vocab_size": tokenizer_sample::VOCAB_SIZE, "max_position_embeddings": 4096});
        let model = Directory::random_with(1, sizes);
        let with_tokenizer = model.to_temporary();
        let tokenizer = tokenizer_sample::sample().to_string();
        std::fs::write(with_tokenizer.path().join("tokenizer.json"), &tokenizer).unwrap();
        let (begin, end) = ("{% for a in range(9000) %}", "{% endfor %}");
        let endless = format!("{}x{}", begin.repeat(5), end.repeat(5));
        let templates =
            [&endless, "{% for message in messages %}{{ message", "{{ raise_exception('no') }}"].map(|text| {
                let directory = model.to_temporary();
                std::fs::write(directory.path().join("tokenizer.json"), &tokenizer).unwrap();
                std::fs::write(directory.path().join("chat_template.jinja"), text).unwrap();
                directory
            });
        let broken = model.to_temporary();
        std::fs::write(broken.path().join("model.safetensors"), "no tensors").unwrap();
        let training = tempfile::tempdir().unwrap();
        write_training(training.path(), with_tokenizer.path());
        Workshop {
            training,
            with_tokenizer,
            without_tokenizer: model.to_temporary(),
            broken,
            templates,
            programs: tempfile::tempdir().unwrap(),
        }
    }

    fn program(&self, source: &str, (language, library): (Language, Library)) -> PathBuf {
        let name = Path::new(source).file_stem().unwrap().to_string_lossy();
        let path = self.programs.path().join(format!("{name}-{language:?}-{library:?}"));
        compile(source, language, library, &path);
        path
    }

    /// What a host is called with, by its source.
    fn arguments(&self, source: &str) -> Vec<PathBuf> {
        let model = self.with_tokenizer.path().to_path_buf();
        match source {
            "misuse_text.c" => {
                let others = [&self.without_tokenizer].into_iter().chain(&self.templates);
                std::iter::once(model).chain(others.map(|directory| directory.path().to_path_buf())).collect()
            }
            "train.c" | "misuse_train.c" => {
                // A directory of its own, for what is written.
                let here = tempfile::tempdir_in(&self.training).unwrap().keep();
                write_training(&here, &model);
                vec![model, here.join("recipe.toml"), here]
            }
            "threads.c" => vec![model, PathBuf::from("60")],
            "guest.c" => vec![model, self.broken.path().to_path_buf(), self.programs.path().join("caught")],
            CHAT => [repository().join("examples/demo-model").to_str().unwrap(), "The reason", "12", "0.7"]
                .map(PathBuf::from)
                .into(),
            "router_patch.c" => std::iter::once(model).chain(self.router_patches()).collect(),
            "reload.c" => vec![model, library_directory().join("libgemmoe.so")],
            _ => vec![model],
        }
    }

    /// Files: a router patch for the model, one for other gates, one that is cut off.
    fn router_patches(&self) -> [PathBuf; 3] {
        let model = common::load(self.with_tokenizer.path());
        let gates: Vec<f32> = model.stored_gates().unwrap().iter().map(|gate| 0.5 - 2.0 * gate).collect();
        let base = model.gates_fingerprint().unwrap();
        let paths = ["patch", "other", "cut"].map(|name| self.programs.path().join(name));
        let patch = |base| RouterPatch::new(model.config(), &gates, base).unwrap();
        patch(base).write(&paths[0]).unwrap();
        patch(base ^ 1).write(&paths[1]).unwrap();
        let bytes = patch(base).to_bytes().unwrap();
        std::fs::write(&paths[2], &bytes[..bytes.len() / 2]).unwrap();
        paths
    }

    /// Builds a host in every way and runs each.
    fn run_every_way(&self, source: &str) {
        for way in ways() {
            let output = run(Command::new(self.program(source, way)).args(self.arguments(source)));
            println!("{source} as {way:?}:\n{output}");
        }
    }

    /// Builds a host in every way; what it prints must be the same.
    fn prints_the_same_every_way(&self, source: &str) -> String {
        let run = |way| run(Command::new(self.program(source, way)).args(self.arguments(source)));
        let printed: BTreeSet<String> = ways().into_iter().map(run).collect();
        assert_eq!(printed.len(), 1, "{source}: {printed:?}");
        printed.into_iter().next().unwrap()
    }
}

#[test]
fn every_wrong_argument_gets_its_documented_status_and_harms_nothing() {
    let workshop = Workshop::new();
    MISUSE.iter().for_each(|source| workshop.run_every_way(source));
}

#[test]
fn threads_get_ok_or_busy_and_a_cancelled_prefill_goes_on() {
    Workshop::new().run_every_way("threads.c");
}

#[test]
fn the_hosts_own_threads_give_the_same_tokens_whatever_they_do_wrong() {
    Workshop::new().run_every_way("parallel_for.c");
}

#[test]
fn router_patches_come_and_go_while_sessions_run() {
    Workshop::new().run_every_way("router_patch.c");
}

#[test]
fn the_library_prints_nothing_and_survives_forks() {
    Workshop::new().run_every_way("guest.c");
}

#[test]
fn every_way_of_linking_generates_the_same_tokens() {
    let tokens = Workshop::new().prints_the_same_every_way("generate.c");
    assert_eq!(tokens.split_whitespace().count(), 8, "{tokens}");
}

#[test]
fn a_session_gives_the_same_tokens_in_slices_forked_restored_and_in_batches() {
    let printed = Workshop::new().prints_the_same_every_way("engine.c");
    assert!(printed.starts_with("simply stepped: "), "{printed}");
    assert_eq!(printed.lines().filter(|line| line.starts_with("json: {")).count(), 3, "{printed}");
}

#[test]
fn a_trainer_steps_goes_on_from_a_checkpoint_and_its_patch_is_the_model_it_writes() {
    let printed = Workshop::new().prints_the_same_every_way("train.c");
    assert!(printed.starts_with("held out: "), "{printed}");
}

#[test]
fn the_example_streams_text_and_reports_how_it_went() {
    let workshop = Workshop::new();
    for way in ways() {
        let program = workshop.program(CHAT, way);
        let output = run(Command::new(&program).args(workshop.arguments(CHAT)));
        for part in ["The reason", "3 prompt tokens, first new token after", "12 new tokens,", "expert 3"] {
            assert!(output.contains(part), "{part:?} is not in\n{output}");
        }
        let failed = Command::new(&program).arg("/nonexistent").output().unwrap();
        assert_eq!(failed.status.code(), Some(1));
        assert!(text(&failed).contains("chat: /nonexistent: DIRECTORY_NOT_FOUND: "), "{}", text(&failed));
    }
}

#[test]
fn the_game_loop_talks_within_its_frames_and_draws_how_long_they_took() {
    let workshop = Workshop::new();
    let demo = repository().join("examples/demo-model");
    for way in ways() {
        let program = workshop.program(GAME_LOOP, way);
        let output = run(Command::new(&program).arg(&demo).args(["The reason", "1", "500"]));
        for part in ["The reason", "of a budget of 0.50 ms", "60 frames, ", "99 of 100 calls within"] {
            assert!(output.contains(part), "{part:?} is not in\n{output}");
        }
        let tokens = output.split(" frames, ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        assert!(tokens.parse::<u32>().unwrap() > 0, "{output}");
        let failed = Command::new(&program).arg("/nonexistent").output().unwrap();
        assert!(text(&failed).contains("game_loop: /nonexistent: DIRECTORY_NOT_FOUND: "), "{}", text(&failed));
    }
}

#[test]
fn the_example_trains_as_its_recipe_says() {
    let workshop = Workshop::new();
    for way in ways() {
        let program = workshop.program(TRAIN, way);
        let here = tempfile::tempdir().unwrap();
        write_training(here.path(), workshop.with_tokenizer.path());
        let (recipe, patch) = (here.path().join("recipe.toml"), here.path().join("patch.safetensors"));
        let output = run(Command::new(&program).args([&recipe, &patch]));
        for part in
            ["12 rows, 6 steps, 320 numbers", "step 6 of 6: loss ", "expert 3 ", "held out: loss ", "written to "]
        {
            assert!(output.contains(part), "{part:?} is not in\n{output}");
        }
        assert!(patch.is_file());
        let failed = Command::new(&program).args([here.path().join("rows.jsonl"), patch]).output().unwrap();
        assert_eq!(failed.status.code(), Some(1));
        assert!(text(&failed).contains("rows.jsonl: RECIPE_SYNTAX: "), "{}", text(&failed));
    }
}

#[test]
fn the_library_can_be_opened_and_closed_again_and_again() {
    let workshop = Workshop::new();
    for way in ways().into_iter().filter(|(_, library)| *library == Library::Static) {
        // This one finds the library by itself; linking it as well would keep it from closing.
        let (language, _) = way;
        let program = workshop.programs.path().join(format!("reload-{language:?}"));
        let (compiler, standard) = match language {
            Language::C99 => ("cc", ["-x", "c", "-std=c99"]),
            Language::Cpp11 => ("c++", ["-x", "c++", "-std=c++11"]),
        };
        let mut command = Command::new(compiler);
        command.args(standard).args(["-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
        command.arg("-I").arg(repository().join("include")).arg(repository().join("tests/hosts/reload.c"));
        run(command.args(["-x", "none", "-ldl", "-o"]).arg(&program));
        run(Command::new(&program).args(workshop.arguments("reload.c")));
    }
}

/// Prints a struct as `layout.c` does. The pattern names every field, or it does not compile.
macro_rules! layout {
    ($lines:ident, $struct:ident, $name:literal, $($field:ident: $type:ty),*) => {
        let _ = |value: ffi::$struct| { let ffi::$struct { $($field: _),* } = value; };
        $lines.push(format!("{} {}", $name, size_of::<ffi::$struct>()));
        $(
            let _: fn(ffi::$struct) -> $type = |value| value.$field;
            let offset = std::mem::offset_of!(ffi::$struct, $field);
            $lines.push(format!("{}.{} {} {}", $name, stringify!($field), offset, size_of::<$type>()));
        )*
    };
}

#[test]
fn structs_have_one_layout_in_c_and_in_rust() {
    let mut lines: Vec<String> = Vec::new();
    layout!(lines, GemmoeDeviceInfo, "gemmoe_device_info", struct_size: u32, index: u32, capability_major: u32,
        capability_minor: u32, memory_bytes: u64, free_bytes: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeLoadOptions, "gemmoe_load_options", struct_size: u32, flags: u32, threads: u32,
        instructions: u32, kv_limit_bytes: u64, priority: u32, spin_us: u32, parallel_for: ffi::GemmoeParallelFor,
        parallel_for_context: *mut c_void, experts_format: u32, attention_format: u32,
        head_format: u32, embedding_format: u32, device: u32, device_index: u32, device_memory_limit: u64,
        cuda_context: *mut c_void, cuda_stream: *mut c_void, reserved: [u64; 4]);
    layout!(lines, GemmoeLoadProgress, "gemmoe_load_progress", struct_size: u32, state: u32, bytes_total: u64,
        bytes_read: u64);
    layout!(lines, GemmoeModelInfo, "gemmoe_model_info", struct_size: u32, vocab_size: u32, hidden_size: u32,
        intermediate_size: u32, num_hidden_layers: u32, num_attention_heads: u32, num_key_value_heads: u32,
        head_dim: u32, num_local_experts: u32, num_experts_per_tok: u32, max_position_embeddings: u32,
        bos_token: u32, has_tokenizer: u32, reserved0: u32, weight_bytes: u64, expert_bytes: u64,
        tokenizer_bytes: u64, kv_bytes_per_token: u64, experts_format: u32, attention_format: u32,
        head_format: u32, embedding_format: u32, reserved: [u64; 4]);
    layout!(lines, GemmoeResidency, "gemmoe_residency", struct_size: u32, reserved0: u32, device_bytes: u64,
        staging_bytes: u64, host_bytes: u64, device_experts: u64, host_experts: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeMessage, "gemmoe_message", struct_size: u32, reserved0: u32, role: *const c_char,
        text: *const c_char, text_bytes: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeSessionOptions, "gemmoe_session_options", struct_size: u32, context_size: u32,
        prefill_chunk: u32, flags: u32, kv_dtype: u32, overflow: u32, keep_tokens: u32, route_capacity: u32,
        kv_limit_bytes: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeSessionInfo, "gemmoe_session_info", struct_size: u32, context_size: u32, token_count: u32,
        pending_count: u32, kv_dtype: u32, grammar_state: u32, dropped_count: u64, kv_bytes: u64,
        workspace_bytes: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeMemoryPlan, "gemmoe_memory_plan", struct_size: u32, context_size: u32, kv_dtype: u32,
        reserved0: u32, weight_bytes: u64, expert_bytes: u64, tokenizer_bytes: u64, kv_bytes_per_token: u64,
        kv_bytes: u64, workspace_bytes: u64, device_bytes: u64, staging_bytes: u64, host_bytes: u64,
        device_experts: u64, host_experts: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeBudget, "gemmoe_budget", struct_size: u32, max_layers: u32, max_us: u64, reserved: [u64; 2]);
    layout!(lines, GemmoeSampling, "gemmoe_sampling", struct_size: u32, temperature: f32, top_k: u32, top_p: f32,
        min_p: f32, repetition_penalty: f32, frequency_penalty: f32, presence_penalty: f32, penalty_window: u32,
        reserved0: u32, seed: u64, logit_bias_tokens: *const u32, logit_bias_values: *const f32,
        logit_bias_count: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeRouteArrays, "gemmoe_route_arrays", struct_size: u32, capacity: u32, positions: *mut u64,
        tokens: *mut u32, experts: *mut u32, weights: *mut f32);
    layout!(lines, GemmoeSessionMetrics, "gemmoe_session_metrics", struct_size: u32, has_first_token: u32,
        time_to_first_token_us: u64, prefill_tokens: u64, prefill_us: u64, decode_tokens: u64, decode_us: u64,
        kv_bytes: u64, workspace_bytes: u64, model_kv_bytes: u64, step_times: [u64; 32],
        model_host_expert_runs: u64, model_host_expert_us: u64, model_expert_copies: u64, model_expert_copy_bytes: u64,
        model_expert_copy_us: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeBatchOptions, "gemmoe_batch_options", struct_size: u32, max_sessions: u32, max_tokens: u32,
        prefill_chunk: u32, max_context: u32, reserved0: u32, reserved: [u64; 4]);
    layout!(lines, GemmoeBatchInfo, "gemmoe_batch_info", struct_size: u32, reserved0: u32, workspace_bytes: u64,
        touched_experts: f64, reserved: [u64; 4]);
    layout!(lines, GemmoeMixOptions, "gemmoe_mix_options", struct_size: u32, flags: u32, threads: u32, reserved0: u32,
        reserved: [u64; 4]);
    layout!(lines, GemmoeMixPlan, "gemmoe_mix_plan", struct_size: u32, num_local_experts: u32,
        num_experts_per_tok: u32, reserved0: u32, parameters: u64, active_parameters: u64, bytes_read: u64,
        bytes_written: u64, scratch_bytes: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeTrainerPlan, "gemmoe_trainer_plan", struct_size: u32, is_preference: u32, num_hidden_layers: u32, num_local_experts: u32, steps: u64, rows: u64, skipped_rows: u64, held_out_rows: u64, tokens: u64, targets: u64, parameters: u64, weight_bytes: u64, workspace_bytes: u64, optimiser_bytes: u64, data_bytes: u64, checkpoint_bytes: u64, reserved: [u64; 4]);
    layout!(lines, GemmoeTrainerMetrics, "gemmoe_trainer_metrics", struct_size: u32, state: u32, bytes_total: u64, bytes_done: u64, steps: u64, total_steps: u64, tokens: u64, targets: u64, loss: f64, text_loss: f64, balance: f64, z_loss: f64, gradient_norm: f64, learning_rate: f64, chosen_reward: f64, rejected_reward: f64, accuracy: f64, reserved: [u64; 4]);
    let workshop = Workshop::new();
    for way in ways() {
        let printed = run(&mut Command::new(workshop.program("layout.c", way)));
        assert_eq!(printed.lines().collect::<Vec<_>>(), lines, "{way:?}");
    }
    let header = std::fs::read_to_string(repository().join("include/gemmoe.h")).unwrap();
    let structs = header.lines().filter(|line| line.starts_with("typedef struct") && line.ends_with('{')).count();
    let described = lines.iter().filter(|line| !line.contains('.')).count();
    assert_eq!(structs, described, "a struct of the header is not compared");
}

/// The functions the header declares.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(repository().join("include/gemmoe.h")).unwrap();
    let code = header.lines().filter(|line| !line.trim_start().starts_with(['*', '/', '#']));
    let code = code.collect::<Vec<_>>().join("\n");
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let before_brackets = code.match_indices('(').map(|(at, _)| &code[..at]);
    let names = before_brackets.map(|text| &text[text.rfind(|letter| !is_name(letter)).map_or(0, |at| at + 1)..]);
    names.filter(|name| name.starts_with("gemmoe_")).map(str::to_owned).collect()
}

#[test]
fn the_misuse_hosts_call_every_function_of_the_header() {
    let read = |name: &str| std::fs::read_to_string(repository().join("tests/hosts").join(name)).unwrap();
    let source: String = MISUSE.iter().copied().chain(["misuse.h", "check.h"]).map(read).collect();
    let declared = declared();
    let missing: Vec<&String> = declared.iter().filter(|name| !source.contains(&format!("{name}("))).collect();
    assert!(declared.len() >= 64, "{} functions were found in the header", declared.len());
    assert!(missing.is_empty(), "in no host of misuse: {missing:?}");
    // In a forked child, every one that has a status.
    let guest = read("guest.c");
    let silent =
        ["gemmoe_abi_version", "gemmoe_version", "gemmoe_status_name", "gemmoe_error_file", "gemmoe_error_key"];
    let has_status = declared.iter().filter(|name| !silent.contains(&name.as_str()) && *name != "gemmoe_error_text");
    let missing: Vec<&String> = has_status.filter(|name| !guest.contains(&format!("IN_CHILD({name}("))).collect();
    assert!(missing.is_empty(), "not tried in a forked child: {missing:?}");
}

#[test]
fn the_shared_library_exports_the_functions_of_the_header_and_nothing_else() {
    if !is_installed("nm") {
        println!("nm is not installed: exported symbols are not compared");
        return;
    }
    let listing = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library_directory().join("libgemmoe.so")));
    let exported: BTreeSet<String> =
        listing.lines().filter_map(|line| line.split_whitespace().nth(2)).map(str::to_owned).collect();
    assert_eq!(exported, declared());
}

#[test]
fn valgrind_finds_no_error_and_no_leak() {
    if !is_installed("valgrind") {
        assert!(std::env::var_os("CI").is_none(), "valgrind is not installed, and this is where it has to run");
        println!("valgrind is not installed: hosts are not run under it");
        return;
    }
    let workshop = Workshop::new();
    let sources = [
        ("generate.c", Library::Static),
        ("misuse.c", Library::Shared),
        ("misuse_text.c", Library::Shared),
        ("misuse_session.c", Library::Shared),
        ("engine.c", Library::Shared),
        ("misuse_train.c", Library::Shared),
        ("train.c", Library::Shared),
        ("router_patch.c", Library::Shared),
        (CHAT, Library::Shared),
        (CHAT, Library::Static),
    ];
    for (source, library) in sources {
        let program = workshop.program(source, (Language::C99, library));
        let mut command = Command::new("valgrind");
        command.args(["-q", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
        command.arg(program).args(workshop.arguments(source));
        if source == "engine.c" {
            command.arg("5");
        }
        run(&mut command);
    }
}
