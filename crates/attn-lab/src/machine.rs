//! What a measurement ran on: `env.json`.

use attn_core::simd::Isa;
use serde::{Deserialize, Serialize};
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// The machine and the program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The CPU's own name.
    pub cpu: String,
    /// Instruction sets that kernels can run with, fastest first.
    pub isas: Vec<Isa>,
    /// CPU features beyond the architecture's base that kernels or limits look at.
    pub features: Vec<String>,
    /// Physical cores, where the system says.
    pub cores: Option<usize>,
    /// Threads that run at once.
    pub threads: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Operating system and version.
    pub os: String,
    /// Compiler that built the program.
    pub rustc: String,
    /// Target it was built for.
    pub target: String,
    /// False for a build without optimisation, whose times mean little.
    pub optimised: bool,
    /// Version of the program.
    pub version: String,
}

impl Machine {
    /// Asks the system.
    pub fn detect() -> Self {
        let what = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(what);
        Self {
            cpu: system.cpus().first().map_or("unknown", |cpu| cpu.brand().trim()).to_string(),
            isas: Isa::available(),
            features: features(),
            cores: System::physical_core_count(),
            threads: crate::pool::all_threads(),
            memory_bytes: system.total_memory(),
            os: System::long_os_version().unwrap_or_else(|| std::env::consts::OS.into()),
            rustc: env!("ATTN_RUSTC").into(),
            target: env!("ATTN_TARGET").into(),
            optimised: !cfg!(debug_assertions),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<String> {
    let known = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512fp16", is_x86_feature_detected!("avx512fp16")),
    ];
    known.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_string()).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<String> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_a_processor_and_memory() {
        let machine = Machine::detect();
        assert!(machine.threads >= 1 && machine.memory_bytes > 1 << 20, "{machine:?}");
        assert!(machine.rustc.starts_with("rustc "), "{machine:?}");
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Machine>(&text).unwrap(), machine);
    }
}
