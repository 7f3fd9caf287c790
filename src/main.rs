//! `vhost-user-qcow2`: parse, log, run, exit status.

use std::process::ExitCode;

use clap::Parser;
use vhost_user_qcow2::cli::logging::Logging;
use vhost_user_qcow2::cli::{Arguments, CAPABILITIES, serve};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    let logging = Logging::start(arguments.log_level.as_deref());
    match serve::run(&arguments, logging) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", serve::complaint(&error));
            ExitCode::FAILURE
        }
    }
}
