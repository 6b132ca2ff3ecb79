//! Holds the eBPF program for VMMs that may not load one.

use std::convert::Infallible;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use ioregion_dispatch::{Program, ebpf};

/// Holds the eBPF program for VMMs that may not load one.
///
/// Each VMM that connects gets a program instance of its own, which sees only threads of the
/// process that connected. When the VMM hangs up its instance is detached; when the loader ends,
/// in whatever way, all are.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  \
    ioregion-loader --socket /run/ioregion/loader.sock --mode 660\n  \
    # in the VMM: let program = Program::connect(\"/run/ioregion/loader.sock\")?;"
)]
struct Options {
    /// Where to listen; an existing socket there is replaced.
    #[arg(long)]
    socket: PathBuf,
    /// Permissions of the socket, in octal: who may connect.
    #[arg(long, default_value = "600", value_parser = octal)]
    mode: u32,
    /// The eBPF object; default: $IOREGION_BPF_OBJECT, else the one that `cargo xtask build-ebpf` made.
    #[arg(long)]
    object: Option<PathBuf>,
}

/// How long to wait for descriptors or memory before the next client is looked at.
const BACK_OFF: Duration = Duration::from_millis(100);

fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("expected permissions in octal, such as 660".into()),
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    match run(Options::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<Infallible> {
    let path = match options.object {
        Some(path) => path,
        None => Program::find()?,
    };
    let object: Arc<[u8]> = std::fs::read(&path)
        .with_context(|| path.display().to_string())?
        .into();
    // Before any client can have taken what it needs: what the kernel can do is found out with the
    // first program, once and for all.
    if let Err(error) = Program::load(&object) {
        tracing::warn!(%error, "VMMs will be refused while this is so");
    }
    let socket = &options.socket;
    // A socket is left behind when its owner is killed; anything else is not ours to remove.
    if UnixStream::connect(socket).is_ok() {
        anyhow::bail!("{}: another loader is listening there", socket.display());
    }
    if std::fs::symlink_metadata(socket).is_ok_and(|meta| is_socket(&meta)) {
        std::fs::remove_file(socket).with_context(|| socket.display().to_string())?;
    }
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    std::fs::set_permissions(socket, Permissions::from_mode(options.mode))
        .with_context(|| socket.display().to_string())?;
    tracing::info!(socket = %socket.display(), object = %path.display(), "listening");
    // What goes wrong with one client must not take the program from the others.
    loop {
        let served = listener.accept().and_then(|(client, _)| {
            let object = Arc::clone(&object);
            std::thread::Builder::new()
                .name("vmm".into())
                .spawn(move || match ebpf::serve_vmm(&client, &object) {
                    Ok(()) => tracing::info!("a VMM hung up; its program is detached"),
                    Err(error) => tracing::warn!(%error, "dropped a VMM"),
                })
        });
        if let Err(error) = served {
            tracing::warn!(%error, "cannot serve a VMM");
            if error.kind() != std::io::ErrorKind::ConnectionAborted {
                // The limit of open files, of threads, of memory: others must give back first.
                std::thread::sleep(BACK_OFF);
            }
        }
    }
}

fn is_socket(meta: &std::fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type())
}
