//! Tests of this binary run again in a child, where the compiler's sanitizers watch the kernels.

use std::process::{Command, Output};

use super::{build, is_hardware, skip};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Check {
    /// AddressSanitizer and UndefinedBehaviorSanitizer: every byte that kernels touch is theirs.
    Memory,
    /// ThreadSanitizer: between two threads of a block that touch the same bytes, one of them writing, there is a barrier
    /// or a meeting of their warp. Blocks count as one after the other; other orders of blocks show where they are not.
    Races,
}

/// Says which check a child is for.
const VARIABLE: &str = "GEMMOE_SHIM_CHECK";

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::Memory => "memory",
            Check::Races => "races",
        }
    }

    /// What has to be loaded before the test binary, which is not compiled with it.
    fn runtime(self) -> &'static str {
        match self {
            Check::Memory => "libasan.so",
            Check::Races => "libtsan.so",
        }
    }
}

/// None where kernels run unwatched.
pub fn of_this_process() -> Option<Check> {
    let value = std::env::var_os(VARIABLE)?;
    [Check::Memory, Check::Races].into_iter().find(|check| value == check.name())
}

/// A test of this binary, ignored or not, passes when it is watched.
pub fn passes_checked(check: Check, test: &str) {
    let Some(output) = run(check, test) else { return };
    let printed = printed(&output);
    assert!(output.status.success(), "{test}, {check:?}: {}\n{printed}", output.status);
    assert!(printed.contains("test result: ok. 1 passed"), "{test} is no test\n{printed}");
}

/// A test is stopped by the check, or judged at its end, with these words.
pub fn fails_checked(check: Check, test: &str, words: &str) {
    let Some(output) = run(check, test) else { return };
    let printed = printed(&output);
    assert!(!output.status.success() && printed.contains(words), "{test}, {check:?}: no {words:?} in\n{printed}");
}

pub fn printed(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// None where the check is not installed, and on hardware.
fn run(check: Check, test: &str) -> Option<Output> {
    if is_hardware() {
        skip("needs the shim");
        return None;
    }
    let runtime = Command::new("c++").arg(format!("-print-file-name={}", check.runtime())).output().ok()?;
    let runtime = String::from_utf8(runtime.stdout).unwrap();
    // Where there is none, the compiler gives back the bare name.
    if !runtime.starts_with('/') {
        println!("{} is not installed: {test} is not checked for {}", check.runtime(), check.name());
        return None;
    }
    build::library(Some(check))?;
    let program = std::env::current_exe().unwrap();
    let mut child = match check {
        Check::Memory => Command::new(program),
        // ThreadSanitizer wants addresses where it expects them.
        Check::Races => {
            let mut child = Command::new("setarch");
            child.arg("-R").arg(program);
            child
        }
    };
    child.args(["--exact", test, "--nocapture", "--include-ignored"]);
    // The test harness itself is not to be judged: it has leaks, and locks that ThreadSanitizer does not know.
    child.env("ASAN_OPTIONS", "detect_leaks=0").env("TSAN_OPTIONS", "ignore_noninstrumented_modules=1");
    child.env("LD_PRELOAD", runtime.trim()).env(VARIABLE, check.name());
    Some(child.output().unwrap())
}
