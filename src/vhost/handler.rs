//! The front-end's messages, one method each, in terms of what the session knows.

use std::fs::File;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as Refusal, GpuBackend, Result as Answer, VhostUserBackendReqHandlerMut,
};

use crate::blk::{FEATURE_EVENT_IDX, FEATURE_FLUSH, write_cache};
use crate::error::Error;
use crate::vhost::memory::{MAX_SLOTS, MemoryTable};
use crate::vhost::ring::{Addresses, Ring};
use crate::vhost::session::{FRONT_END_FEATURES, Session, offered_protocol_features, refuse};

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Answer<()> {
        (self.entered, self.attached) = (true, true);
        Ok(())
    }

    fn reset_owner(&mut self) -> Answer<()> {
        // Long deprecated; the specification lets a back-end disable all rings.
        self.entered = true;
        self.rings.iter_mut().for_each(|ring| ring.set_enabled(false));
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> Answer<()> {
        // The memory stays: front-ends do not send it again. So do the features, which the driver
        // negotiates anew in any case.
        self.entered = true;
        self.stop_all();
        self.set_write_back(self.export.device().settings().write_back);
        self.forget_inflight();
        self.rings.iter_mut().for_each(Ring::reset);
        Ok(())
    }

    fn get_features(&mut self) -> Answer<u64> {
        self.entered = true;
        self.knows_features = true;
        Ok(self.export.device().features() | FRONT_END_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Answer<()> {
        self.entered = true;
        let unknown = features & !(self.export.device().features() | FRONT_END_FEATURES);
        if unknown != 0 {
            let why = format!("{unknown:#x} were not offered");
            return Err(refuse(Error::refused("virtio features", why)));
        }
        self.check_log(features)?;
        let changed = self.features ^ features;
        self.features = features;
        if changed & (FEATURE_EVENT_IDX | FEATURE_FLUSH) != 0 {
            self.stop_all();
        }
        self.settle_log();
        self.settle_all();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Answer<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.entered = true;
        let mut memory = MemoryTable::default();
        for (region, file) in regions.iter().zip(files) {
            memory.add(region, file).map_err(refuse)?;
        }
        self.replace_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Answer<()> {
        let (index, ring) = self.ring(index)?;
        if ring.size() == Some(size) {
            return Ok(());
        }
        let mut result = Ok(());
        self.change(index, |ring| result = ring.set_size(size))?;
        result.map_err(|error| refuse(error.within(format!("queue {index}"))))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Answer<()> {
        let addresses = Addresses { descriptors, available, used };
        let (index, ring) = self.ring(index)?;
        let is_logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        ring.used_log = is_logged.then_some(log);
        let stays = ring.addresses() == Some(addresses) && ring.running;
        self.settle_log();
        if stays {
            return Ok(());
        }
        self.change(index, |ring| ring.set_addresses(addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Answer<()> {
        let (index, ring) = self.ring(index)?;
        let what = format!("queue {index}");
        let Ok(base) = u16::try_from(base) else {
            return Err(refuse(Error::refused(what, format!("the base {base} has over 16 bits"))));
        };
        if !ring.running {
            ring.tell_base(base);
            return self.settle(index);
        }
        if ring.told_base() == Some(base) {
            return Ok(());
        }
        // Requests would be carried out twice or never.
        Err(refuse(Error::refused(what, "the base of a ring that is served cannot be changed")))
    }

    fn get_vring_base(&mut self, index: u32) -> Answer<VhostUserVringState> {
        let number = index;
        let (index, ring) = self.ring(number)?;
        if ring.running {
            self.stop(&[index]);
        }
        let ring = &mut self.rings[index];
        ring.close();
        Ok(VhostUserVringState::new(number, u32::from(ring.base())))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Answer<()> {
        let (index, _) = self.ring(u32::from(index))?;
        self.change(index, |ring| ring.set_kick(kick))
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Answer<()> {
        let (index, ring) = self.ring(u32::from(index))?;
        ring.set_call(call);
        if !ring.running {
            // A predecessor may have completed requests without having been able to tell.
            ring.signal_call();
            return Ok(());
        }
        let call = ring.call().map_err(|error| refuse(Error::io("copying a descriptor", error)))?;
        if let Some(pool) = &self.pool {
            pool.set_call(index, call);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, error: Option<File>) -> Answer<()> {
        let (index, ring) = self.ring(u32::from(index))?;
        ring.set_error(error);
        if ring.running {
            let copy = ring.error();
            let copy = copy.map_err(|error| refuse(Error::io("copying a descriptor", error)))?;
            if let Some(pool) = &self.pool {
                pool.set_error(index, copy);
            }
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Answer<VhostUserProtocolFeatures> {
        self.entered = true;
        Ok(offered_protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Answer<()> {
        self.entered = true;
        let unknown = features & !offered_protocol_features().bits();
        self.protocol = features & !unknown;
        if unknown != 0 {
            let why = format!("{unknown:#x} were not offered");
            return Err(refuse(Error::refused("protocol features", why)));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Answer<u64> {
        self.entered = true;
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Answer<()> {
        let starts = enable && !self.rings.iter().any(Ring::is_enabled);
        let (index, ring) = self.ring(index)?;
        ring.set_enabled(enable);
        if starts {
            self.announce();
        }
        self.settle(index)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Answer<Vec<u8>> {
        self.entered = true;
        let device = self.export.device();
        let config = device.read_config(offset, size, self.is_write_back());
        let config = config.ok_or(Refusal::InvalidParam)?;
        self.note_config_read(offset, size);
        Ok(config)
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Answer<()> {
        self.entered = true;
        if let Some(write_back) = write_cache(offset, bytes) {
            self.set_write_back(write_back);
            return Ok(());
        }
        let what = format!("writing {} bytes at {offset} of the configuration space", bytes.len());
        Err(refuse(Error::refused(what, "only the write-cache byte can be changed")))
    }

    fn get_max_mem_slots(&mut self) -> Answer<u64> {
        self.entered = true;
        Ok(MAX_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Answer<Option<VhostUserMemoryRegionBase>> {
        self.entered = true;
        self.memory.add(region, file).map_err(refuse)?;
        // Rings that are served stay where they are, so they need not stop.
        self.update_memory();
        self.settle_all();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Answer<()> {
        self.entered = true;
        let mut memory = self.memory.clone();
        if !memory.remove(region) {
            let (guest, size) = (region.guest_phys_addr, region.memory_size);
            let what = format!("memory region of {size:#x} bytes at {guest:#x}");
            return Err(refuse(Error::refused(what, "there is no such region")));
        }
        self.replace_memory(memory);
        Ok(())
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Answer<(VhostUserInflight, File)> {
        self.entered = true;
        self.make_inflight(wanted)
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Answer<()> {
        self.entered = true;
        self.take_inflight(region, file)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Answer<()> {
        self.entered = true;
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Answer<File> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Answer<Option<File>> {
        self.begin_transfer(direction, file).map(|()| None)
    }

    fn check_device_state(&mut self) -> Answer<()> {
        self.end_transfer()
    }

    fn get_shmem_config(&mut self) -> Answer<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Answer<()> {
        self.entered = true;
        self.set_log(log, file)
    }
}

/// The answer to requests that belong to features which are not offered.
fn not_offered<T>() -> Answer<T> {
    Err(Refusal::InvalidOperation("its protocol feature was not offered"))
}
