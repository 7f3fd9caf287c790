//! What to tell a virtual machine monitor so that its guest gets the disk.

use std::path::Path;

/// The arguments that attach the disk behind `socket`, for people to copy.
pub(super) fn arguments(socket: &Path) -> String {
    let path = socket.display().to_string();
    // QEMU ends a value at a comma unless it is doubled.
    let qemu = quote(&format!("socket,id=disk,path={}", path.replace(',', ",,")));
    let hypervisor = quote(&format!("vhost_user=on,socket={path}"));
    format!(
        "Guest memory must be shared with this process. To attach the disk:\n\
         \n\
         qemu-system-x86_64 -m 1G \\\n    \
         -object memory-backend-memfd,id=memory,size=1G,share=on \\\n    \
         -machine q35,memory-backend=memory \\\n    \
         -chardev {qemu} -device vhost-user-blk-pci,chardev=disk ...\n\
         \n\
         cloud-hypervisor --memory size=1G,shared=on --disk {hypervisor} ...\n"
    )
}

/// `text` as one word of a shell.
fn quote(text: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/=,._-+:@%".contains(letter);
    if text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_paths_survive_the_shell_and_qemu() {
        let text = arguments(Path::new("/run/vm/disk.sock"));
        assert!(text.contains("-chardev socket,id=disk,path=/run/vm/disk.sock -device"), "{text}");
        assert!(text.contains("--disk vhost_user=on,socket=/run/vm/disk.sock ..."), "{text}");
        let text = arguments(Path::new("/it's, odd"));
        assert!(text.contains(r"-chardev 'socket,id=disk,path=/it'\''s,, odd' -device"), "{text}");
    }
}
