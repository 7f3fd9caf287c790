//! `vhost-user-qcow2`: parse, log, run, exit status.

use std::process::ExitCode;

use clap::Parser;
use vhost_user_qcow2::cli::logging::Logging;
use vhost_user_qcow2::cli::{Arguments, CAPABILITIES, serve, verb};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return verb::misused(&error),
    };
    if arguments.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    if let Some(file) = arguments.print_file {
        let program = std::env::current_exe().unwrap_or_else(|_| "vhost-user-qcow2".into());
        print!("{}", file.text(&program));
        return ExitCode::SUCCESS;
    }
    let logging = Logging::start(arguments.log_level.as_deref());
    if let Some(verb) = &arguments.verb {
        return verb.run();
    }
    match serve::run(&arguments, logging) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", serve::complaint(&error));
            ExitCode::FAILURE
        }
    }
}
