//! A disk of 8 MiB in memory: `ramdisk NAME` serves it until its standard input ends.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use ioregion_devices::virtio::{AtOnce, Broken, Chain, Device, Lane, Memory, Refusal};
use ioregion_vduse::{Control, DeviceConfig, DeviceFile, Service, ServiceOptions, offered, vdpa};

struct RamDisk(Mutex<Vec<u8>>);

const BYTES: usize = 8 << 20;
/// Type, a reserved word, first sector.
const HEADER: u32 = 16;

impl Device for RamDisk {
    fn kind(&self) -> u32 {
        2 // VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        (BYTES as u64 / 512).to_le_bytes().to_vec()
    }

    fn queues(&self) -> u16 {
        1
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        let serve = move |chain: &Chain, memory: &dyn Memory| self.serve(chain, memory);
        Ok(Box::new(AtOnce(serve)))
    }
}

impl RamDisk {
    /// Carries a request out: how many bytes of the driver's memory were written.
    fn serve(&self, chain: &Chain, memory: &dyn Memory) -> Result<u32, Broken> {
        let mut header = [0; HEADER as usize];
        chain.read(memory, 0, &mut header)?;
        let (words, _) = header.as_chunks::<4>();
        let word = |number: usize| u32::from_le_bytes(words[number]);
        let (kind, sector) = (word(0), u64::from(word(2)) | u64::from(word(3)) << 32);
        // The status is the last byte; before it there is room for data.
        let room = chain.writable_len().checked_sub(1);
        let room = room.ok_or(Broken::Request("no room for a status"))?;
        let data = chain.readable_len() - HEADER;

        let mut disk = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = |len: u32| {
            let start = usize::try_from(sector).ok()?.checked_mul(512)?;
            Some(start..start.checked_add(len as usize)?)
        };
        let (status, written) = match kind {
            // Read.
            0 => match place(room).and_then(|range| disk.get(range)) {
                Some(bytes) => {
                    chain.write(memory, 0, bytes)?;
                    (0, room)
                }
                None => (1, 0),
            },
            // Write.
            1 => match place(data).and_then(|range| disk.get_mut(range)) {
                Some(bytes) => {
                    chain.read(memory, HEADER, bytes)?;
                    (0, 0)
                }
                None => (1, 0),
            },
            // The serial number.
            8 if room == 20 => {
                chain.write(memory, 0, b"ramdisk\0\0\0\0\0\0\0\0\0\0\0\0\0")?;
                (0, room)
            }
            // Nothing else is known.
            _ => (2, 0),
        };
        chain.write(memory, room, &[status])?;
        Ok(if written == room { room + 1 } else { 0 })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).ok_or("usage: ramdisk NAME")?;
    let device = Arc::new(RamDisk(Mutex::new(vec![0; BYTES])));
    let options = ServiceOptions::default();
    let control = Control::open()?;
    control.create(&DeviceConfig {
        name: name.clone(),
        device_id: device.kind(),
        vendor_id: 0,
        features: offered(&*device, &options),
        queues: device.queues(),
        config: device.config(),
    })?;
    let file = DeviceFile::open(&name)?;
    file.set_up_queue(0, 128)?;
    let service = Service::start(&name, file, device, options)?;
    // With virtio_vdpa loaded there is a disk (/dev/vda) when this returns.
    vdpa::attach(&name)?;

    io::copy(&mut io::stdin(), &mut io::sink())?;

    vdpa::detach(&name)?;
    service.stop()?;
    control.destroy(&name)?;
    Ok(())
}
