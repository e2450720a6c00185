//! The main loop: who gets a turn, when to report, when to sleep.

use crate::platform::apic::SleepTimer;
use crate::platform::boot_info::{BootInfo, LowMemory};
use crate::platform::clock::Clock;
use crate::platform::memory::{Memory, WorkingMemory};
use crate::platform::power::Power;
use crate::platform::serial::Serial;
use pulse_core::acpi::Acpi;
use pulse_core::cmdline::Settings;
use pulse_core::console::Limiter;
use pulse_core::load::{Load, Rate};
use pulse_core::report::{LoadFields, Report, WrongPageEvent};
use pulse_core::text::Escaped;
use pulse_core::workload::Workload;

/// Wrong pages that are printed in a second; all are counted.
const WRONG_PAGES_A_SECOND: u32 = 20;
/// The longest sleep of a guest that has a rate to keep.
const BUSY_TICK_NS: u64 = 1_000_000;
/// The longest sleep of a guest that only checks now and then.
const IDLE_TICK_NS: u64 = 10_000_000;

/// The guest's state.
pub struct Machine {
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
    filled: bool,
}

impl Machine {
    /// Reads what the VMM left, says hello, and gets everything ready.
    pub fn start(start_info: u64, has_kvm_clock: bool) -> Self {
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
        let memory = Memory::new(boot.ram);
        let (pages, generations) = memory.into_pages();
        let workload = Workload::new(pages, generations, settings.seed, settings.load);
        serial.line(format_args!(
            "{{\"event\":\"start\",\"version\":\"{}\",{},\"seed\":{},\"memory\":{},\"clock\":\"{}\"}}",
            env!("CARGO_PKG_VERSION"),
            LoadFields(workload.load()),
            settings.seed,
            workload.capacity_bytes(),
            clock.name()
        ));
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
            filled: false,
        }
    }

    /// A turn for everyone, or a sleep when no one has anything to do.
    pub fn step(&mut self) {
        let now_ns = self.clock.now();
        self.max_gap_ns = self.max_gap_ns.max(now_ns - self.last_ns);
        self.last_ns = now_ns;

        let mut busy = self.work(now_ns);
        if now_ns >= self.next_report_ns {
            self.report(now_ns);
        }
        busy |= self.serial.step();
        if !busy && !self.settings.spin {
            let until_report = self.next_report_ns.saturating_sub(now_ns);
            self.timer.sleep(self.longest_sleep().min(until_report));
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

    fn longest_sleep(&self) -> u64 {
        self.settings.tick_ns.unwrap_or(match self.workload.load().rate {
            Rate::BytesPerSecond(0) => IDLE_TICK_NS,
            _ => BUSY_TICK_NS,
        })
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

    /// Changes the load.
    #[allow(dead_code)]
    pub fn set_load(&mut self, load: Load) -> Load {
        let load = self.workload.set_load(load);
        self.filled = self.workload.is_filled();
        load
    }
}
