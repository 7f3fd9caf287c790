//! Files that a package installs beside the program. They are kept here as files and are a part of
//! the program, so that it can always print those that fit it.

use std::path::Path;

use clap::ValueEnum;

/// A file for packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum File {
    /// /usr/share/qemu/vhost-user/50-vhost-user-qcow2.json, by which libvirt finds the program
    Capability,
    /// /usr/lib/systemd/system/vhost-user-qcow2@.service, for one disk of many
    Service,
    /// /usr/lib/systemd/system/vhost-user-qcow2@.socket, on which systemd listens for it
    Socket,
}

/// Where a file names the program.
const BINARY: &str = "@BINARY@";

impl File {
    fn template(self) -> &'static str {
        match self {
            Self::Capability => include_str!("50-vhost-user-qcow2.json"),
            Self::Service => include_str!("vhost-user-qcow2@.service"),
            Self::Socket => include_str!("vhost-user-qcow2@.socket"),
        }
    }

    /// The file's text, for a program at `binary`.
    pub fn text(self, binary: &Path) -> String {
        self.template().replace(BINARY, &binary.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_names_the_program_where_it_must() {
        let program = Path::new("/usr/libexec/vhost-user-qcow2");
        for file in [File::Capability, File::Service, File::Socket] {
            let text = file.text(program);
            assert!(!text.contains('@') || text.contains("qcow2@"), "{text}");
            assert!(!text.contains(BINARY), "{text}");
            let names = text.contains("/usr/libexec/vhost-user-qcow2");
            assert_eq!(names, file != File::Socket, "{text}");
        }
    }
}
