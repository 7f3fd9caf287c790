//! `vhost-user-qcow2`: parse, log, run, exit status.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use vhost_user_qcow2::cli::logging::Logging;
use vhost_user_qcow2::cli::{Arguments, CAPABILITIES, Command, ctl, serve};
use vhost_user_qcow2::error::Error;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    if let Some(Command::Ctl(call)) = &arguments.command {
        return match ctl::run(call) {
            // Who has stopped reading, as `head` does, wants no more.
            Ok(result) => match writeln!(std::io::stdout(), "{result}") {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            },
            Err(error) => fail(&error),
        };
    }
    if let Some(file) = arguments.print_file {
        let program = std::env::current_exe().unwrap_or_else(|_| "vhost-user-qcow2".into());
        print!("{}", file.text(&program));
        return ExitCode::SUCCESS;
    }
    let logging = Logging::start(arguments.log_level.as_deref());
    match serve::run(&arguments, logging) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    eprintln!("{}", serve::complaint(error));
    ExitCode::FAILURE
}
