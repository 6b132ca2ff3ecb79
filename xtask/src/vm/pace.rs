//! How patient test programs are in a VM, and how much of the long tests they do.

use super::options::{KernelChoice, VmArgs};
use super::qemu::Accelerator;

/// Emulated, an access takes some ten to a hundred times as long as on a CPU.
const SLOWNESS: u32 = 10;
/// The checkers of the debug kernel cost as much again and more.
const DEBUG_SLOWNESS: u32 = 60;
/// Of the long tests' amounts, one in so many.
const ONE_IN: u32 = 10;
/// How long the kernel's tests make up ioctls with `--full`.
const FUZZ_SECONDS: u32 = 300;

/// How often a full run kills a service under load; otherwise the tests say.
const KILLS: u32 = 100;

/// Variables for all programs, said to the user where they change what runs.
pub fn environment(accelerator: Accelerator, args: &VmArgs) -> Vec<(String, String)> {
    let mut set = Vec::new();
    if args.full {
        set.push(("IOREGION_TEST_KILLS", KILLS));
    }
    if args.full && args.has_patches() {
        set.push(("FUZZ_SECONDS", FUZZ_SECONDS));
    }
    let debug = args.kernel == KernelChoice::Debug;
    if accelerator != Accelerator::Kvm || debug {
        let slowness = if debug { DEBUG_SLOWNESS } else { SLOWNESS };
        set.push(("IOREGION_TEST_SLOWNESS", slowness));
        if !args.full {
            set.push(("IOREGION_TEST_ONE_IN", ONE_IN));
        }
        if args.runs_suite() {
            let part = match args.full {
                true => "all that the long tests do".into(),
                false => format!("one in {ONE_IN} of what the long tests do (--full: all)"),
            };
            println!("slow machine: limits {slowness} times as long, {part}");
        }
    }
    let text = |(name, value): (&str, u32)| (name.to_owned(), value.to_string());
    set.into_iter().map(text).collect()
}
