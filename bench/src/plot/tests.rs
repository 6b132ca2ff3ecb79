use super::*;
use crate::synthetic::{results, set};

fn plots(runs: &[Results]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let written = write_all(runs, &dir.path().join("plots")).unwrap();
    (dir, written)
}

#[test]
fn every_plot_is_written_as_svg_and_png() {
    let (_dir, written) = plots(&[results()]);
    assert_eq!(written.len(), 8);
    for path in &written {
        let bytes = fs::read(path).unwrap();
        let magic: &[u8] = if path.extension().unwrap() == "svg" {
            b"<svg"
        } else {
            b"\x89PNG"
        };
        assert!(bytes.starts_with(magic), "{}", path.display());
    }
    let svg = fs::read_to_string(&written[0]).unwrap();
    assert!(svg.contains("ebpf-coalesced-polled/posted") && svg.contains("(log scale)"));
    assert!(svg.contains("Synthetic | CPU, KVM pvm"));
}

#[test]
fn several_runs_get_plots_of_their_own() {
    let (_dir, written) = plots(&[results(), results()]);
    assert_eq!(written.len(), 16);
    assert!(written[8].ends_with("2-latency.svg"));
}

#[test]
fn plot_without_figures_is_left_out() {
    let mut r = results();
    r.scenarios.retain(|s| s.name == "kvm-run/write");
    set(&mut r, "kvm-run/write", |s| {
        (s.vcpu_ns, s.round_means_ns) = (Default::default(), vec![])
    });
    let (_dir, written) = plots(&[r.clone()]);
    assert_eq!(written.len(), 4, "{written:?}");
    set(&mut r, "kvm-run/write", |s| s.lost = 1);
    assert!(plots(&[r]).1.is_empty());
}

#[test]
fn extreme_and_hostile_figures_draw_without_panic() {
    let mut r = results();
    set(&mut r, "kvm-run/write", |s| {
        s.vcpu_ns.p99 = 1_000_000_000_000_000;
        s.cpu_ns_per_access.device = 1e15;
    });
    set(&mut r, "bystander/exit", |s| {
        s.round_means_ns = vec![0.0; 3]
    });
    set(&mut r, "ioeventfd/posted@10000", |s| {
        s.doorbells = u32::MAX;
        s.round_means_ns = vec![1e15];
    });
    r.scenarios[0].name = "a<b>&\u{1b}\n\"".repeat(50);
    let (_dir, written) = plots(&[r]);
    assert!(!fs::read_to_string(&written[0]).unwrap().contains('\u{1b}'));
}

#[test]
fn times_are_readable() {
    let cases = [
        (500.0, "500 ns"),
        (2_500.0, "2.5 µs"),
        (36_000.0, "36 µs"),
        (1e6, "1 ms"),
        (2e9, "2 s"),
        (0.0, "0 ns"),
    ];
    for (ns, expected) in cases {
        assert_eq!(time(ns), expected);
    }
}
