//! Puts the compiler's version and the target into the program, for `env.json`.

use std::process::Command;

fn main() {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version.and_then(|out| String::from_utf8(out.stdout).ok()).unwrap_or_default();
    let target = std::env::var("TARGET").unwrap_or_default();
    // Build scripts speak to cargo through standard output.
    #[allow(clippy::print_stdout)]
    {
        println!("cargo:rustc-env=ATTN_RUSTC={}", version.trim());
        println!("cargo:rustc-env=ATTN_TARGET={target}");
        println!("cargo:rerun-if-changed=build.rs");
    }
}
