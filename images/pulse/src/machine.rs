//! The main loop: who gets a turn, when to report, when to sleep.

use crate::net::{Net, Storage};
use crate::platform::apic::SleepTimer;
use crate::platform::boot_info::{BootInfo, LowMemory};
use crate::platform::clock::Clock;
use crate::platform::interrupts;
use crate::platform::memory::{Memory, WorkingMemory, program};
use crate::platform::power::Power;
use crate::platform::serial::Serial;
use pulse_core::acpi::Acpi;
use pulse_core::cmdline::{Content, Settings};
use pulse_core::console::Limiter;
use pulse_core::discovery::Devices;
use pulse_core::http::{Command, Guest};
use pulse_core::load::{Load, Rate};
use pulse_core::page::{Body, Recipe};
use pulse_core::report::{LoadFields, Report, Sample, Status, WrongPageEvent};
use pulse_core::text::Escaped;
use pulse_core::workload::Workload;

/// Wrong pages that are printed in a second; all are counted.
const WRONG_PAGES_A_SECOND: u32 = 20;
/// The longest sleep of a guest that has a rate to keep, or a card that cannot wake it.
const BUSY_TICK_NS: u64 = 1_000_000;
/// The longest sleep of a guest that only checks now and then.
const IDLE_TICK_NS: u64 = 10_000_000;
/// Time for an answer to leave before the machine ends.
const COMMAND_DELAY_NS: u64 = 50_000_000;

/// Text of which pages can be made: the guest's own sources.
const TEXT: &str = concat!(
    include_str!("acpi.rs"),
    include_str!("cmdline.rs"),
    include_str!("http.rs"),
    include_str!("load.rs"),
    include_str!("machine.rs"),
    include_str!("net/device.rs"),
    include_str!("net/services.rs"),
    include_str!("page.rs"),
    include_str!("report.rs"),
    include_str!("workload.rs"),
    include_str!("workload/tests.rs"),
);

/// The guest's state.
pub struct Machine<'s> {
    clock: Clock,
    timer: SleepTimer,
    serial: Serial,
    power: Power,
    workload: Workload<'static, WorkingMemory>,
    wrong_pages: Limiter,
    settings: Settings,
    /// The last report.
    report: Report,
    next_report_ns: u64,
    last_ns: u64,
    max_gap_ns: u64,
    /// The same since the last sample.
    sample_gap_ns: u64,
    filled: bool,
    net: Option<Net<'s>>,
    /// What HTTP asked for, and when its answer will have left.
    command: Option<(Command, u64)>,
}

impl<'s> Machine<'s> {
    /// Reads what the VMM left, says hello, and gets everything ready.
    pub fn start(start_info: u64, has_kvm_clock: bool, sockets: &'s mut Storage<'s>) -> Self {
        let mut clock = Clock::new(has_kvm_clock);
        let mut serial = Serial::new();
        let boot = BootInfo::read(start_info);
        let settings = Settings::parse(boot.cmdline.as_str(), |word, expected| {
            serial.line(format_args!(
                "{{\"event\":\"warning\",\"word\":\"{}\",\"message\":\"not taken: expected {}\"}}",
                Escaped(word),
                expected.0
            ));
        });
        let acpi = Acpi::read(&LowMemory, boot.rsdp);
        let mut devices = Devices::from_cmdline(boot.cmdline.as_str());
        if devices.as_slice().is_empty() {
            devices = acpi.devices.clone();
        }
        let mut memory = Memory::new(boot.ram);
        let net = Net::start(&settings, &devices, &acpi.io_apics, &mut memory, sockets, clock.now());
        let (pages, generations) = memory.into_pages();
        let body = match settings.content {
            Content::Random => Body::Random,
            Content::Text => Body::Corpus(TEXT.as_bytes()),
            Content::Binary => Body::Corpus(program()),
            Content::Zero => Body::Zero,
        };
        let workload = Workload::new(pages, generations, Recipe { seed: settings.seed, body }, settings.load);
        serial.line(format_args!(
            "{{\"event\":\"start\",\"version\":\"{}\",{},\"seed\":{},\"memory\":{},\"clock\":\"{}\"}}",
            env!("CARGO_PKG_VERSION"),
            LoadFields(workload.load()),
            settings.seed,
            workload.capacity_bytes(),
            clock.name()
        ));
        match &net {
            Some(net) => serial.line(format_args!(
                "{{\"event\":\"network\",\"mac\":\"{}\",\"base\":{},\"irq\":{},\"interrupt\":{}}}",
                net.mac(),
                net.device.base,
                net.device.irq,
                net.has_interrupt
            )),
            None if settings.ip.is_some() || settings.ip6.is_some() => {
                serial.line(format_args!("{{\"event\":\"warning\",\"message\":\"no network card that works\"}}"));
            }
            None => {}
        }
        let timer = SleepTimer::new(&mut clock);
        let now_ns = clock.now();
        Self {
            clock,
            timer,
            serial,
            power: Power::new(&acpi),
            workload,
            wrong_pages: Limiter::new(WRONG_PAGES_A_SECOND),
            settings,
            report: Report::default(),
            next_report_ns: now_ns + settings.report_ns,
            last_ns: now_ns,
            max_gap_ns: 0,
            sample_gap_ns: 0,
            filled: false,
            net,
            command: None,
        }
    }

    /// A turn for everyone, or a sleep when no one has anything to do.
    pub fn step(&mut self) {
        let now_ns = self.clock.now();
        self.max_gap_ns = self.max_gap_ns.max(now_ns - self.last_ns);
        self.sample_gap_ns = self.sample_gap_ns.max(now_ns - self.last_ns);
        self.last_ns = now_ns;

        let mut busy = self.work(now_ns);
        busy |= self.talk(now_ns);
        if now_ns >= self.next_report_ns {
            self.report(now_ns);
        }
        busy |= self.serial.step();
        if !busy && !self.settings.spin {
            let next_ns = self.next_report_ns.min(self.net.as_ref().map_or(u64::MAX, Net::next_ns));
            self.timer.sleep(self.longest_sleep().min(next_ns.saturating_sub(now_ns)));
        }
    }

    fn work(&mut self, now_ns: u64) -> bool {
        let Self { workload, serial, wrong_pages, .. } = self;
        let busy = workload.step(now_ns, |wrong, pages| {
            if wrong_pages.admit(now_ns) {
                let address = pages.address(wrong.expected.number);
                serial.line(format_args!("{}", WrongPageEvent { t_ms: now_ns / 1_000_000, address, wrong }));
            }
        });
        if !self.filled && self.workload.is_filled() {
            self.filled = true;
            let t_ms = now_ns / 1_000_000;
            self.serial
                .line(format_args!("{{\"event\":\"filled\",\"t_ms\":{t_ms},{}}}", LoadFields(self.workload.load())));
        }
        busy
    }

    fn talk(&mut self, now_ns: u64) -> bool {
        let Some(net) = &mut self.net else { return false };
        let mut view = View {
            workload: &mut self.workload,
            filled: &mut self.filled,
            report: self.report,
            now_ns,
            gap_ns: &mut self.sample_gap_ns,
        };
        let (busy, command) = net.poll(now_ns, &mut view);
        if let Some(command) = command {
            self.command.get_or_insert((command, now_ns + COMMAND_DELAY_NS));
        }
        if let Some((command, at_ns)) = self.command
            && now_ns >= at_ns
        {
            self.serial.line(format_args!("{{\"event\":\"{}\",\"t_ms\":{}}}", command.name(), now_ns / 1_000_000));
            self.serial.flush();
            match command {
                Command::PowerOff => self.power.off(),
                Command::Reboot => self.power.reset(),
                Command::Crash => interrupts::crash(),
            }
        }
        busy
    }

    fn longest_sleep(&self) -> u64 {
        let idle = self.workload.load().rate == Rate::BytesPerSecond(0);
        let is_woken = self.net.as_ref().is_none_or(|net| net.has_interrupt);
        self.settings.tick_ns.unwrap_or(if idle && is_woken { IDLE_TICK_NS } else { BUSY_TICK_NS })
    }

    fn report(&mut self, now_ns: u64) {
        self.report = Report {
            t_ms: now_ns / 1_000_000,
            counters: self.workload.counters(),
            max_gap_us: self.max_gap_ns.div_ceil(1000),
        };
        self.max_gap_ns = 0;
        self.serial.line(format_args!("{}", self.report));
        let (suppressed, dropped) = (self.wrong_pages.take_suppressed(), self.serial.take_dropped());
        if suppressed > 0 || dropped > 0 {
            self.serial
                .line(format_args!("{{\"event\":\"held-back\",\"wrong_pages\":{suppressed},\"lines\":{dropped}}}"));
        }
        // Reports keep their rhythm; after a long pause it starts anew.
        self.next_report_ns += self.settings.report_ns;
        if self.next_report_ns <= now_ns {
            self.next_report_ns = now_ns + self.settings.report_ns;
        }
        if self.power.take_button() {
            self.serial.line(format_args!("{{\"event\":\"power-button\",\"t_ms\":{}}}", now_ns / 1_000_000));
            self.serial.flush();
            self.power.off();
        }
    }
}

/// What HTTP sees of the guest.
struct View<'a> {
    workload: &'a mut Workload<'static, WorkingMemory>,
    filled: &'a mut bool,
    report: Report,
    now_ns: u64,
    gap_ns: &'a mut u64,
}

impl Guest for View<'_> {
    fn sample(&mut self) -> Sample {
        Sample {
            now_ns: self.now_ns,
            counters: self.workload.counters(),
            max_gap_ns: core::mem::take(self.gap_ns),
            is_filled: self.workload.is_filled(),
        }
    }

    fn status(&self) -> Status {
        Status { report: self.report, uptime_ms: self.now_ns / 1_000_000 }
    }

    fn load(&self) -> Load {
        self.workload.load()
    }

    fn set_load(&mut self, load: Load) -> Load {
        let load = self.workload.set_load(load);
        *self.filled = self.workload.is_filled();
        load
    }
}
