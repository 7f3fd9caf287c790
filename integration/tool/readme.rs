//! The README's examples of the image tool, run as they stand there.
//!
//! They are the indented lines of the section "The image tool": commands of a shell, in one
//! directory, in the order of the text. Every verb that `--help` lists has one.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use integration::daemon::program;
use integration::scratch::{Scratch, target_directory};

const README: &str = include_str!("../../README.md");
/// The section with the examples.
const SECTION: &str = "## The image tool";
/// The name that the examples call the program by.
const NAME: &str = "vhost-user-qcow2";
/// Verbs that are no part of the image tool: one needs a running daemon, one is the help itself.
const ELSEWHERE: [&str; 2] = ["ctl", "help"];

/// The commands of the section, each with its continuation lines.
fn examples() -> Vec<String> {
    let (_, section) = README.split_once(SECTION).expect("the README has the section");
    let (section, _) = section.split_once("\n## ").unwrap_or((section, ""));
    let mut commands: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in section.lines().filter_map(|line| line.strip_prefix("    ")) {
        match commands.last_mut() {
            Some(last) if goes_on => last.push_str(&format!("\n{line}")),
            _ => commands.push(line.to_owned()),
        }
        goes_on = line.ends_with('\\');
    }
    commands
}

/// The verbs that `--help` lists.
fn verbs() -> Vec<String> {
    let output = Command::new(program()).arg("--help").output().expect("the program starts");
    let help = String::from_utf8(output.stdout).expect("text");
    let (_, list) = help.split_once("Verbs:\n").expect("a list of verbs");
    let list = list.lines().take_while(|line| !line.is_empty());
    // What a verb means stands behind its name, or deeper on the next line.
    let names = list.filter_map(|line| line.strip_prefix("  ").filter(|it| !it.starts_with(' ')));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// A directory for programs, in which the examples find this one under its name.
fn install(directory: &Path) -> std::ffi::OsString {
    std::fs::create_dir(directory).expect("a directory");
    std::os::unix::fs::symlink(program(), directory.join(NAME)).expect("a link");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(directory.to_owned()).chain(std::env::split_paths(&path));
    std::env::join_paths(all).expect("paths without colons")
}

/// Runs a script of a shell, which must succeed.
fn run(directory: &Path, path: &OsStr, script: &str) {
    let output = Command::new("sh")
        .args(["-euc", script])
        .current_dir(directory)
        .env("PATH", path)
        .env_remove("RUST_LOG")
        .output()
        .expect("a shell");
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{script} ({}): {said}", output.status);
}

/// Makes the image of a distribution that the examples look into: a Debian root in the first
/// partition of a disk.
fn provide_debian(directory: &Path, path: &OsStr) {
    let root = target_directory().join("guest/root.raw");
    assert!(root.exists(), "{} is missing: run .ci/setup first", root.display());
    let script = format!(
        "truncate -s $(($(stat -c %s {root}) + (4 << 20))) debian.raw
        {NAME} partitions -f raw --create gpt --add name=root debian.raw
        dd if={root} of=debian.raw bs=1M seek=1 conv=notrunc,sparse status=none
        qemu-img convert -f raw -O qcow2 debian.raw debian.qcow2",
        root = root.display()
    );
    run(directory, path, &script);
}

#[test]
fn every_verb_has_an_example_in_the_readme_and_every_example_works() {
    let (scratch, programs) = (Scratch::new("tool-readme"), Scratch::new("tool-programs"));
    let path = install(&programs.file("bin"));
    let examples = examples();
    provide_debian(scratch.directory(), &path);
    for command in &examples {
        run(scratch.directory(), &path, command);
    }
    let verbs = verbs();
    eprintln!("{} examples of {} verbs", examples.len(), verbs.len());
    assert!(verbs.len() >= 10, "{verbs:?}");
    for verb in verbs.iter().filter(|verb| !ELSEWHERE.contains(&verb.as_str())) {
        let call = format!("{NAME} {verb} ");
        let shown = examples.iter().any(|command| format!("{command} ").contains(&call));
        assert!(shown, "the README's section {SECTION:?} has no example of {verb}");
    }
}
