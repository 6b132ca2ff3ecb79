//! Measures disks over VDUSE, in the VM of `cargo xtask bench --vduse`.

mod burst;
mod processes;
mod service;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use ioregion_bench::results::{Host, Mode, Provenance};
use ioregion_bench::vduse::{Disks, Load, Memory, Row, SCHEMA, Settings};
use nix::mount::{MsFlags, mount};

use burst::{Disk, Random};
use service::Service;

/// Both sides have these.
const QUEUES: u16 = 1;
const QUEUE_SIZE: u16 = 256;
/// The file, on a RAM disk of 16 MiB.
const MIB: usize = 12;

#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The `ioregion` command
    #[arg(long, value_name = "FILE")]
    program: PathBuf,
    /// A RAM disk, whose contents are lost: the file is on ext4 on it
    #[arg(long, value_name = "DEVICE", default_value = "/dev/ram0")]
    device: PathBuf,
    /// The file is on tmpfs instead, where io_uring leaves each request to a thread of its own
    #[arg(long)]
    tmpfs: bool,
    /// Bursts of each side, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only loads whose name contains this; no file is written then
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Without io_uring on both sides
    #[arg(long)]
    no_io_uring: bool,
    /// Through the page cache on both sides
    #[arg(long)]
    cached: bool,
}

/// Measures and writes the file.
pub fn run(args: &LoadArgs) -> Result<()> {
    println!("seed {}", args.seed);
    let image = prepare(args)?;
    let (ours, theirs) = (service::ours(args, &image), service::theirs(args, &image));
    let settings = Settings {
        both: vec![
            match args.cached {
                true => "page cache".into(),
                false => "O_DIRECT".into(),
            },
            match args.no_io_uring {
                true => "no io_uring".into(),
                false => "io_uring".into(),
            },
            format!("queues: {QUEUES}"),
            format!("queue size: {QUEUE_SIZE}"),
            match args.tmpfs {
                true => format!("raw file of {MIB} MiB on tmpfs"),
                false => format!("raw file of {MIB} MiB on ext4 on a RAM disk"),
            },
            "virtio_vdpa".into(),
        ],
        ours: service::line(&ours),
        theirs: service::line(&theirs),
    };
    let ours = Service::start("ours", ours, false)?;
    let theirs = Service::start("theirs", theirs, true)?;
    let disks = [Disk::open(&ours.disk)?, Disk::open(&theirs.disk)?];
    let before = [ours.resident()?, theirs.resident()?];
    let mut rows: Vec<Row> = Load::ALL
        .into_iter()
        .filter(|load| load.name().contains(&args.filter))
        .map(|load| Row {
            load,
            ours: Vec::new(),
            theirs: Vec::new(),
        })
        .collect();
    let services = [&ours, &theirs];
    let mut random = Random::new(args.seed);
    for round in 0..=args.rounds {
        for row in &mut rows {
            // Both go to the same places; who comes first is up to chance.
            let (first, places) = (usize::from(random.next() >> 63 == 1), random.next());
            for side in [first, 1 - first] {
                let burst = disks[side].burst(&row.load, places, || services[side].cpu())?;
                if round > 0 {
                    let bursts = match side {
                        0 => &mut row.ours,
                        _ => &mut row.theirs,
                    };
                    bursts.push(burst);
                }
            }
        }
        println!("round {round} of {}", args.rounds);
    }
    let after = [ours.resident()?, theirs.resident()?];
    drop(disks);
    ours.end()?;
    theirs.end()?;
    let memory = |side: usize| Memory {
        before: before[side],
        after: after[side],
    };
    let mut disks = Disks {
        schema: SCHEMA,
        host: Host::gather(),
        provenance: Provenance::gather(Mode::Full, args.seed, args.rounds.into()),
        settings,
        rows,
        ours: memory(0),
        theirs: memory(1),
        claims: Vec::new(),
    };
    disks.complete();
    println!("{}", disks.render(ioregion_bench::report::Format::Text));
    if args.filter.is_empty() {
        let folder = std::env::var_os("IOREGION_RESULTS").context("no folder for results")?;
        disks.save(&Path::new(&folder).join("disks.json"))?;
    }
    Ok(())
}

/// Makes the file, written once from end to end.
fn prepare(args: &LoadArgs) -> Result<PathBuf> {
    let place = std::env::temp_dir().join("disks");
    std::fs::create_dir_all(&place)?;
    let (source, kind) = match args.tmpfs {
        true => (Path::new("tmpfs"), "tmpfs"),
        false => (&*args.device, "ext4"),
    };
    if !args.tmpfs {
        let status = std::process::Command::new("mkfs.ext4")
            // A journal takes room and does things in between.
            .args(["-q", "-F", "-O", "^has_journal"])
            .arg(source)
            .status()
            .context("starting mkfs.ext4")?;
        if !status.success() {
            bail!("mkfs.ext4 {}: {status}", source.display());
        }
    }
    let flags = MsFlags::empty();
    mount(Some(source), &place, Some(kind), flags, None::<&str>)
        .with_context(|| format!("mounting {}", source.display()))?;
    let image = place.join("image");
    std::fs::write(&image, vec![0x5a; MIB << 20]).context("writing the image")?;
    std::fs::File::open(&image)?.sync_all()?;
    Ok(image)
}
