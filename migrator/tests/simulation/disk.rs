//! A journal as bytes, written by the encoder that ships and read by its decoder; what power and full disks do to it.

use migrator::MigrationId;
use migrator::handoff::{HandoffRecord, Step};
use migrator::journal;
use migrator::traits::Durability;

use crate::common::Random;

#[derive(Clone, Debug, Default)]
pub struct Disk {
    bytes: Vec<u8>,
    /// So many bytes are on stable storage.
    synced: usize,
    pub full: bool,
}

impl Disk {
    pub fn append(&mut self, id: MigrationId, step: Step) -> std::io::Result<()> {
        if self.full {
            return Err(std::io::Error::other("no space left on device"));
        }
        // As opening it does: a record that was cut off is removed first.
        self.bytes.truncate(journal::decode_all(&self.bytes).map_err(|_| std::io::Error::other("damaged"))?.1);
        self.bytes.extend(encode(id, step));
        if step.durability() == Durability::Durable {
            self.synced = self.bytes.len();
        }
        Ok(())
    }

    /// The process dies in the middle of writing a record: all of it is in the file, or nothing, or some.
    pub fn interrupt(&mut self, id: MigrationId, step: Step, random: &mut Random) {
        if !self.full {
            let record = encode(id, step);
            let most = if random.chance(40) { record.len() } else { random.below(record.len() as u64) as usize };
            self.bytes.extend(&record[..most]);
        }
    }

    /// The power goes: what was not synced is there to some byte, perhaps with zeros behind it.
    pub fn lose_power(&mut self, random: &mut Random) {
        let kept = self.synced + random.below((self.bytes.len() - self.synced) as u64 + 1) as usize;
        self.bytes.truncate(kept);
        if random.chance(30) {
            self.bytes.resize(kept + random.below(200) as usize, 0);
        }
        self.synced = kept;
    }

    pub fn records(&self) -> Vec<HandoffRecord> {
        journal::decode_all(&self.bytes).expect("power and full disks do no damage that the decoder refuses").0
    }

    pub fn remove(&mut self) {
        (self.bytes, self.synced) = (Vec::new(), 0);
    }
}

fn encode(id: MigrationId, step: Step) -> Vec<u8> {
    journal::encode(&HandoffRecord { id, step, unix_ms: 1, vm: "vm".into(), peer: "peer:7437".into() })
}
