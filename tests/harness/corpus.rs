//! Inputs for the fuzzers as files, and back: `corpus unpack DIRECTORY` writes those that are kept
//! and the examples, one directory for each target; `corpus pack DIRECTORY` keeps what lies there.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use harness::examples::{self, TARGETS};

fn unpack(directory: &Path) -> std::io::Result<()> {
    for target in TARGETS {
        let directory = directory.join(target);
        fs::create_dir_all(&directory)?;
        let inputs = examples::of(target);
        println!("{} inputs in {}", inputs.len(), directory.display());
        for (name, input) in inputs {
            fs::write(directory.join(name), input)?;
        }
    }
    Ok(())
}

fn pack(directory: &Path) -> std::io::Result<()> {
    for target in TARGETS {
        let mut inputs = Vec::new();
        for entry in fs::read_dir(directory.join(target))? {
            inputs.push(fs::read(entry?.path())?);
        }
        // Like next to like, which compresses well, and the same order every time.
        inputs.sort();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/fuzz/corpus");
        let packed = examples::pack(&inputs);
        println!("{} inputs of {target} in {} bytes", inputs.len(), packed.len());
        fs::write(path.join(format!("{target}.gz")), packed)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["unpack", directory] => unpack(Path::new(directory)),
        ["pack", directory] => pack(Path::new(directory)),
        _ => {
            eprintln!("corpus unpack|pack DIRECTORY");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("corpus: {error}");
            ExitCode::FAILURE
        }
    }
}
