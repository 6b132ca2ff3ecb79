//! Plants a fault in the test VM, so that what notices faults is tested: fails, hangs, or writes
//! to one of the kernel's files that provoke a crash.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["fail"] => return ExitCode::FAILURE,
        ["abort"] => std::process::abort(),
        ["hang"] => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        // In one write: the file takes each write for a command.
        ["write", file, text] => {
            let written = OpenOptions::new()
                .write(true)
                .open(file)
                .and_then(|mut file| file.write_all(text.as_bytes()));
            match written {
                Ok(()) => println!("wrote {text} to {file}"),
                Err(error) => println!("writing {text} to {file}: {error}"),
            }
        }
        _ => {
            eprintln!("usage: plant fail | abort | hang | write FILE TEXT");
            return ExitCode::from(2);
        }
    }
    // What waits for interrupts gets them: each line goes out over the serial line.
    for second in 1..=5 {
        println!("still here after {second} s");
        std::thread::sleep(Duration::from_secs(1));
    }
    ExitCode::SUCCESS
}
