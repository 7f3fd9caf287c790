//! A vhost-user-blk daemon that serves qcow2 and raw images to virtual machines.
