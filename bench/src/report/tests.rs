use super::*;
use crate::synthetic::{results, set};

fn line<'a>(text: &'a str, starts: &str) -> &'a str {
    text.lines()
        .find(|l| l.starts_with(starts))
        .unwrap_or_else(|| panic!("no {starts:?} in\n{text}"))
}

#[test]
fn report_has_provenance_scenarios_ratios_and_claims() {
    let text = render(&[results()], Format::Text);
    let first = text.lines().next().unwrap();
    assert!(
        first.contains("revision 0123456789ab") && first.contains("KVM pvm"),
        "{first}"
    );
    let row = line(&text, "ebpf-ioeventfd/posted  ");
    assert!(
        row.contains("ioeventfd/–/sleep") && row.contains("3,087") && row.ends_with("0/0/0"),
        "{row}"
    );
    let claim = line(&text, "ebpf-ioeventfd-sink-vs-ioeventfd");
    assert!(
        claim.contains("≤ 1.1") && claim.contains("1.050 (1.050 to 1.050)"),
        "{claim}"
    );
    assert!(claim.trim_end().ends_with("holds"), "{claim}");
    assert!(text.contains("the kernel lacks it"));
    assert!(!text.contains("MISS"));
}

#[test]
fn missed_bar_is_printed_as_miss() {
    let mut r = results();
    set(&mut r, "bystander/exit+attached", |s| {
        s.round_means_ns.iter_mut().for_each(|ns| *ns *= 1.1)
    });
    for format in [Format::Text, Format::Markdown] {
        let text = render(&[r.clone()], format);
        let row = text
            .lines()
            .find(|l| l.contains("ebpf-bystander "))
            .unwrap();
        assert!(row.contains("MISS") && row.contains("0.122"), "{row}");
    }
}

#[test]
fn noisy_and_absent_claims_say_so_instead_of_a_figure() {
    let mut r = results();
    r.scenarios.retain(|s| s.name != "forward-stream/posted");
    set(&mut r, "ebpf-ioeventfd-polled/posted@10000", |s| {
        (0..)
            .zip(&mut s.round_means_ns)
            .for_each(|(i, ns)| *ns *= [1.0, 3.0][i % 2]);
    });
    let text = render(&[r], Format::Text);
    let (claims, notes) = text.split_once("Notes on the claims").unwrap();
    assert!(line(claims, "ebpf-vs-forward  ").ends_with("–  no verdict"));
    let absent = "ebpf-vs-forward: not measured: forward-stream/posted";
    assert!(notes.contains(absent), "{notes}");
    assert!(line(claims, "ebpf-10k-doorbells-vs-1").ends_with("no verdict"));
    assert!(
        notes.contains("ebpf-10k-doorbells-vs-1: noisy: "),
        "{notes}"
    );
    let ratios = text.split("Ratios of").nth(1).unwrap();
    assert!(line(ratios, "ebpf-ioeventfd-polled/posted@10000").contains("rounds would do"));
}

#[test]
fn times_of_a_scenario_with_wrong_values_are_withheld() {
    let mut r = results();
    set(&mut r, "kvm-run/write", |s| s.lost = 3);
    let text = render(&[r], Format::Text);
    let row = line(&text, "kvm-run/write  ");
    assert!(
        row.contains("withheld") && !row.contains("9,000") && row.ends_with("3/0/0"),
        "{row}"
    );
    assert!(line(&text, "integrity").contains("MISS"));
}

#[test]
fn several_files_stand_in_blocks_of_their_own() {
    let mut other = results();
    other.scenarios.iter_mut().for_each(|s| s.vcpu_ns.p50 /= 2);
    other.scenarios.retain(|s| s.name != "kvm-run/read");
    let text = render(&[results(), other], Format::Text);
    assert!(text.starts_with("[1] 2000-01-01"));
    assert!(line(&text, "scenario").contains("[2] p50"));
    assert!(line(&text, "kvm-run/read").ends_with('–'));
    let row = line(&text, "ioeventfd/posted  ");
    assert!(row.contains("2,940") && row.contains("1,470"), "{row}");
    assert!(line(&text, "id  ").contains("[2] verdict"));
}

#[test]
fn markdown_rows_have_as_many_cells_as_the_header() {
    for runs in [vec![results()], vec![results(), results()]] {
        let text = render(&runs, Format::Markdown);
        for table in text.split("###").skip(1) {
            let cells = |l: &str| l.replace("\\|", "").matches('|').count();
            let counts: Vec<usize> = table
                .lines()
                .filter(|l| l.starts_with('|'))
                .map(cells)
                .collect();
            assert!(counts.windows(2).all(|w| w[0] == w[1]), "{table}");
        }
    }
}

#[test]
fn small_rates_are_not_rounded_to_zero() {
    assert_eq!(per_access(0.0), "0.000");
    assert_eq!(per_access(1e-5), "1e-5");
    assert_eq!(figure(1e-6, None), "1e-6");
    assert_eq!(figure(0.0, None), "0");
    assert_eq!(count(1_234_567), "1,234,567");
}
