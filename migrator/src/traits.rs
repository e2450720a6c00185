//! What a migration needs from the world: the two ends of the VM, its memory, a journal, and connections.
//!
//! The program implements [`SourceVm`], [`DestinationVm`] and [`GuestPages`] for its VM; [`crate::journal::FileJournal`]
//! and [`crate::transport`] implement the rest for files and TCP. Tests implement all of them without a hypervisor.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::bitmap::{Bitmap, ChunkBits};
use crate::handoff::HandoffRecord;
use crate::layout::{CHUNK_PAGES, PAGE_SIZE, PageRun, RamLayout};
use crate::transport::ConnectError;
use crate::wire::preamble::Preamble;

/// Why the VM could not do what was asked. Its text and its causes end up in the report.
pub type VmError = Box<dyn Error + Send + Sync>;

/// What the source says of its VM before a byte of RAM moves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmDescription {
    /// The VM's name.
    pub name: String,
    /// Its RAM.
    pub ram: RamLayout,
    /// The guest is paused, and stays so at the destination.
    pub paused: bool,
    /// Configuration, CPU and host facts for the destination's preflight. Not looked into by this crate.
    pub facts: serde_json::Value,
}

/// One thing in which the two hosts differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mismatch {
    /// What differs, as a user would call it ("CPU feature avx512f").
    pub what: String,
    /// What the source has.
    pub source: String,
    /// What the destination has.
    pub destination: String,
    /// What would help; may be empty.
    pub hint: String,
}

/// The destination will not take this VM. Lists everything that is in the way, not only the first thing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// One sentence.
    pub reason: String,
    /// Every mismatch found.
    pub mismatches: Vec<Mismatch>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)?;
        for mismatch in &self.mismatches {
            write!(f, "; {}: {} here, {} there", mismatch.what, mismatch.source, mismatch.destination)?;
            if !mismatch.hint.is_empty() {
                write!(f, " ({})", mismatch.hint)?;
            }
        }
        Ok(())
    }
}

impl Error for Refusal {}

/// One piece of saved VM state: a vCPU, a device. The bytes belong to whoever saved them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Section {
    /// What it is the state of.
    pub kind: u16,
    /// Which one of these.
    pub instance: u16,
    /// Version of the bytes' format.
    pub version: u16,
    /// The state itself.
    pub bytes: Vec<u8>,
}

/// One piece of what a page stream carries: bytes of ours, or pages straight from guest memory.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// These pages, in order.
    Pages(PageRun),
}

/// Guest memory, read at the source and written at the destination, page by page ([`crate::layout`] has the numbering).
///
/// At the source the guest writes to it meanwhile: two reads of a page may differ, and nothing here relies on a
/// second read. Page runs and chunks that are passed in lie within [`GuestPages::layout`].
pub trait GuestPages: Send + Sync {
    /// The RAM that this is.
    fn layout(&self) -> &RamLayout;

    /// Of the pages in `wanted` of a chunk, those that are all zeros right now.
    fn find_zero(&self, chunk: u64, wanted: &ChunkBits) -> io::Result<ChunkBits> {
        let mut zero = ChunkBits::default();
        let mut page_bytes = [0; PAGE_SIZE];
        for run in wanted.runs(chunk * CHUNK_PAGES) {
            for page in run.first..run.first + run.pages {
                self.read(PageRun { first: page, pages: 1 }, &mut page_bytes)?;
                if page_bytes == [0; PAGE_SIZE] {
                    zero.set(page - chunk * CHUNK_PAGES);
                }
            }
        }
        Ok(zero)
    }

    /// Source, pre-copy rounds only: called just before the pages in `bits` of a chunk are read, so that a write from
    /// now on is logged again (`KVM_CLEAR_DIRTY_LOG` for these pages). Does nothing where reading the log clears it.
    /// Not called in the last round: the vCPUs are paused, and protecting pages again would be blackout for nothing.
    fn rearm(&self, chunk: u64, bits: &ChunkBits) -> io::Result<()> {
        let _ = (chunk, bits);
        Ok(())
    }

    /// Source, first round only: sets in `into` the bits of pages that were written since they were armed, as
    /// [`SourceVm::collect_dirty`] would, and of all that never were. Changes nothing: they are still there to be collected. May leave
    /// out any. Sets none where reading the log clears it.
    fn peek_dirty(&self, _into: &mut Bitmap) -> io::Result<()> {
        Ok(())
    }

    /// Writes all parts to a blocking socket, in order, in as few system calls as possible and without a copy of our
    /// own. Goes on after a partial write; an error is final for the stream. Must not raise SIGPIPE.
    fn send(&self, parts: &[Part<'_>], to: BorrowedFd<'_>) -> io::Result<()>;

    /// Fills all pages of `runs`, in order, and then `tail` from a blocking socket. An end of the stream in between is
    /// [`io::ErrorKind::UnexpectedEof`].
    fn receive(&self, runs: &[PageRun], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()>;

    /// Copies pages out; `into` is as long as the run.
    fn read(&self, run: PageRun, into: &mut [u8]) -> io::Result<()>;

    /// All pages of the run are about to be written, by [`GuestPages::write`]: they may be made ready together.
    fn expect(&self, run: PageRun) -> io::Result<()> {
        let _ = run;
        Ok(())
    }

    /// Copies pages in; `from` is as long as the run.
    fn write(&self, run: PageRun, from: &[u8]) -> io::Result<()>;

    /// Makes the pages zero. Should not allocate memory for pages that are zero already: a fresh destination is.
    fn clear(&self, run: PageRun) -> io::Result<()>;

    /// xxh3 (64 bits, seed 0) over all pages in order, for the `verify` option. Called while the guest is paused.
    fn hash(&self) -> io::Result<u64> {
        let mut hasher = Xxh3::new();
        let mut buffer = vec![0; PAGE_SIZE * CHUNK_PAGES as usize];
        for chunk in 0..self.layout().chunks() {
            let run = PageRun { first: chunk * CHUNK_PAGES, pages: self.layout().chunk_pages(chunk) };
            let bytes = &mut buffer[..run.bytes() as usize];
            self.read(run, bytes)?;
            hasher.update(bytes);
        }
        Ok(hasher.digest())
    }
}

/// The VM at the source, as the thread sees it that runs [`crate::driver::migrate`].
///
/// All calls come from that thread, one after the other. None may take long: cancel is answered between them.
pub trait SourceVm: Send {
    /// What to tell the destination.
    fn description(&self) -> VmDescription;

    /// The guest's memory.
    fn memory(&self) -> Arc<dyn GuestPages>;

    /// Starts the dirty log. Everything counts as dirty at first, whether the log says so or not: the first round
    /// sends all pages. Called once an attempt; a retry calls it again after [`SourceVm::stop_dirty_log`].
    fn start_dirty_log(&mut self) -> Result<(), VmError>;

    /// Sets in `into` the bits of the pages that were written (by vCPUs, and by the VMM's own devices) since they were
    /// last armed: by `start_dirty_log`, by [`GuestPages::rearm`], or by an earlier call of this where reading the log
    /// clears it. Bits that are set stay set. Once read here they are the migration's to send.
    fn collect_dirty(&mut self, into: &mut Bitmap) -> Result<(), VmError>;

    /// Stops the dirty log. Called after the migration is settled, never in the blackout; also after a start that failed.
    fn stop_dirty_log(&mut self);

    /// Takes so many thousandths (up to [`crate::precopy::MAX_THROTTLE`]) of its time from the guest, from now on; 0 gives it all back, and is
    /// called whatever happened before. Not called with more for a guest that is paused.
    fn throttle(&mut self, permille: u16) -> Result<(), VmError>;

    /// Stops all vCPUs and quiesces all devices: from its return on no one writes guest memory.
    /// Not called for a guest that is paused already.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets the guest run again after a `pause` of ours, as if nothing had happened.
    fn resume(&mut self) -> Result<(), VmError>;

    /// The state of everything but memory. The guest is paused.
    fn save_state(&mut self) -> Result<Vec<Section>, VmError>;

    /// Why the guest is gone (it powered off, it crashed, its VMM failed), once it is. Polled between steps.
    fn gone(&mut self) -> Option<String> {
        None
    }
}

/// What the destination knows after it started the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Started {
    /// Just before the first `KVM_RUN`; none if the guest stays paused.
    pub first_run: Option<Instant>,
}

/// The guest could not be started at the destination, after COMMIT.
#[derive(Debug, thiserror::Error)]
#[error("the guest could not be started")]
pub struct StartError {
    /// Whether a vCPU may have entered the guest, or a device may have acted for it. When in doubt: true. If not, the
    /// destination gives up and the source goes on; if so, the destination owns what there is.
    pub may_have_run: bool,
    /// The cause.
    #[source]
    pub source: VmError,
}

/// The VM at the destination, as the thread sees it that runs [`crate::driver::receive`].
pub trait DestinationVm: Send {
    /// Builds everything: VM, vCPUs, devices, TAP plugged in. Nothing may be left to build after this: what comes
    /// later happens in the blackout. Refuses with every mismatch it finds.
    fn prepare(&mut self, description: &VmDescription) -> Result<(), Refusal>;

    /// The memory that `prepare` made, all zeros.
    fn memory(&self) -> Arc<dyn GuestPages>;

    /// A guess at how long `load_state` and `start` will take together. Part of the predicted blackout.
    fn estimate(&self) -> Duration {
        Duration::from_micros(500)
    }

    /// Loads the state of everything but memory. Memory is complete when this is called.
    fn load_state(&mut self, sections: Vec<Section>) -> Result<(), VmError>;

    /// Runs the guest, or takes it over without running it if `paused`. Called only after COMMIT was journaled.
    fn start(&mut self, paused: bool) -> Result<Started, StartError>;

    /// Where announcements go. Called after `load_state`.
    fn announcer(&self) -> Arc<dyn Announcer>;

    /// Frees everything: this VM will not run here. Called at most once, and nothing is called after it.
    fn discard(&mut self);
}

/// The addresses of one network interface of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NicAddresses {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The guest's IPv4 addresses on it, known or learned.
    pub ipv4: Vec<Ipv4Addr>,
    /// The guest's IPv6 addresses on it.
    pub ipv6: Vec<Ipv6Addr>,
}

/// How the destination tells the network where the guest is now. Frames enter the network as if the guest had sent
/// them.
pub trait Announcer: Send + Sync {
    /// One entry for each network interface.
    fn addresses(&self) -> Vec<NicAddresses>;

    /// Sends an Ethernet frame (without checksum) out of the interface with this number in [`Announcer::addresses`].
    fn inject_frame(&self, nic: usize, frame: &[u8]) -> io::Result<()>;

    /// Whether the guest can be asked to announce itself (virtio-net `VIRTIO_NET_F_GUEST_ANNOUNCE`).
    fn guest_can_announce(&self) -> bool {
        false
    }

    /// Asks it, once, as soon as it runs. Called only if it can be asked.
    fn guest_announce(&self) {}
}

/// Whether a record must survive the loss of power before the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// On stable storage when `append` returns.
    Durable,
    /// Enough if it survives the process: losing it to a power cut leads to the same answer as having it.
    Lazy,
}

/// Where a side keeps what it decided. [`crate::handoff`] says what is written when, and what it means.
pub trait Journal: Send {
    /// Adds a record at the end. With [`Durability::Durable`], it is on stable storage when this returns. After an error the
    /// record must not be found later; an implementation undoes what it can.
    fn append(&mut self, record: &HandoffRecord, durability: Durability) -> io::Result<()>;

    /// How long a durable record takes, at the best of our knowledge; none if it cannot be told without writing one. Leaves nothing
    /// behind. Called before anything moves; an error is final for the attempt.
    fn measure(&mut self) -> io::Result<Option<Duration>> {
        Ok(None)
    }

    /// All records, oldest first.
    fn load(&mut self) -> io::Result<Vec<HandoffRecord>>;
}

/// A connection to the peer after its preamble: two directions that are used by two threads.
pub trait Connection: Send {
    /// Who is at the other end, for messages.
    fn peer(&self) -> String;

    /// Takes the two directions apart.
    fn split(self: Box<Self>) -> io::Result<Split>;
}

/// The two directions of a [`Connection`], and what ends both.
pub struct Split {
    /// What comes from the peer.
    pub reader: Box<dyn ConnectionReader>,
    /// What goes to the peer.
    pub writer: Box<dyn ConnectionWriter>,
    /// Ends the connection from any thread.
    pub closer: Arc<dyn Closer>,
}

/// The receiving direction. Reads block; a timeout is [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`].
pub trait ConnectionReader: Read + Send {
    /// How long a read may wait for the first byte; none: for ever.
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// The socket, if its bytes are the stream's bytes: then pages go from the socket to guest memory directly.
    fn socket(&self) -> Option<BorrowedFd<'_>>;
}

/// The sending direction. Writes block until the kernel took the bytes.
pub trait ConnectionWriter: Write + Send {
    /// How long a write may wait for room; none: for ever.
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// The socket, if the stream's bytes are its bytes: then pages go from guest memory to the socket directly.
    fn socket(&self) -> Option<BorrowedFd<'_>>;

    /// Takes as many bytes as can be sent without waiting, and says how many. Of those, some may go out only with the next
    /// write, or with a flush, if they [wait](Self::waits). By default it takes none.
    fn write_now(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Ok(0)
    }

    /// Whether bytes that were taken wait for a flush.
    fn waits(&self) -> bool {
        false
    }

    /// Says that nothing more will come; what was written still arrives.
    fn finish(&self) -> io::Result<()>;
}

/// Ends a connection, both directions at once; whoever is blocked in it returns.
pub trait Closer: Send + Sync {
    /// Ends it. May be called again.
    fn close(&self);
}

/// How the source reaches the destination.
pub trait Dialer: Send + Sync {
    /// Who is dialled, for messages ("host2:7437").
    fn peer(&self) -> String;

    /// Opens a connection: connects, exchanges the preamble, and (with TLS) proves who is who.
    fn dial(&self, preamble: &Preamble) -> Result<Box<dyn Connection>, ConnectError>;
}
