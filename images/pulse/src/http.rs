//! HTTP, as much of it as a status page and a few knobs need: one request a connection, answered at once.

use crate::load::{Expected, Load};
use crate::report::{LoadFields, Sample, Status};
use crate::text::{Escaped, Text};
use core::fmt::{self, Write};

/// Bytes of an answer at most, head included.
pub const MOST_ANSWER_BYTES: usize = 4096;
/// Bytes of a request's head at most.
pub const MOST_REQUEST_BYTES: usize = 2048;

/// An answer as it goes on the wire.
pub type Answer = Text<MOST_ANSWER_BYTES>;

/// What the services may ask of the guest.
pub trait Guest {
    /// The counters as they are now.
    fn sample(&mut self) -> Sample;
    /// The last report, and the time now.
    fn status(&self) -> Status;
    /// The load in force.
    fn load(&self) -> Load;
    /// Changes the load, and returns the one then in force.
    fn set_load(&mut self, load: Load) -> Load;
}

/// What a request wants done after its answer has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Switch the machine off.
    PowerOff,
    /// Reset it.
    Reboot,
    /// End it by a triple fault.
    Crash,
}

impl Command {
    /// Its name in an event.
    pub fn name(self) -> &'static str {
        match self {
            Self::PowerOff => "poweroff",
            Self::Reboot => "reboot",
            Self::Crash => "crash",
        }
    }
}

/// Answers what has come of a request so far. `None`: the head is not complete yet.
pub fn answer(request: &[u8], guest: &mut dyn Guest, out: &mut Answer) -> Option<Option<Command>> {
    out.clear();
    if !request.windows(4).any(|w| w == b"\r\n\r\n") && !request.windows(2).any(|w| w == b"\n\n") {
        if request.len() < MOST_REQUEST_BYTES {
            return None;
        }
        respond(out, "400 Bad Request", TEXT, format_args!("the request's head is too long\n"));
        return Some(None);
    }
    let Some(target) = parse_target(request) else {
        respond(out, "400 Bad Request", TEXT, format_args!("not a GET or POST request\n"));
        return Some(None);
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut command = None;
    match path {
        "/" => respond(out, "200 OK", "text/html; charset=utf-8", format_args!("{PAGE}")),
        "/status" => respond(out, "200 OK", JSON, format_args!("{}\n", guest.status())),
        "/work" => change_load(query, guest, out),
        "/poweroff" => command = Some(Command::PowerOff),
        "/reboot" => command = Some(Command::Reboot),
        "/crash" => command = Some(Command::Crash),
        _ => respond(
            out,
            "404 Not Found",
            TEXT,
            format_args!("there is /, /status, /work, /poweroff, /reboot, /crash\n"),
        ),
    }
    if command.is_some() {
        respond(out, "200 OK", JSON, format_args!("{{\"ok\":true}}\n"));
    }
    Some(command)
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const PAGE: &str = include_str!("http/page.html");

fn parse_target(request: &[u8]) -> Option<&str> {
    let line = request.split(|&byte| byte == b'\n').next()?;
    let mut words = core::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let method = words.next()?;
    let target = words.next()?;
    let version = words.next()?;
    let sound = matches!(method, "GET" | "POST") && target.starts_with('/') && version.starts_with("HTTP/1.");
    (sound && words.next().is_none()).then_some(target)
}

fn change_load(query: &str, guest: &mut dyn Guest, out: &mut Answer) {
    let mut load = guest.load();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let result = load.set(key, value).unwrap_or(Err(Expected("one of ws, rate, pattern, verify")));
        if let Err(Expected(expected)) = result {
            let body = format_args!("{{\"error\":\"{}: expected {}\"}}\n", Escaped(pair), expected);
            return respond(out, "400 Bad Request", JSON, body);
        }
    }
    let load = guest.set_load(load);
    respond(out, "200 OK", JSON, format_args!("{{{}}}\n", LoadFields(load)));
}

fn respond(out: &mut Answer, status: &str, content_type: &str, body: fmt::Arguments<'_>) {
    let mut length = Length(0);
    // Neither writer ever fails: the one only counts, the other cuts.
    let _ = write!(length, "{body}");
    let _ = write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n\
         Connection: close\r\n\r\n{body}",
        length.0
    );
}

/// Counts what is written to it.
struct Length(usize);

impl Write for Length {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Pattern, Rate};
    use crate::report::Report;

    struct Fake(Load);

    impl Guest for Fake {
        fn sample(&mut self) -> Sample {
            Sample::default()
        }
        fn status(&self) -> Status {
            Status { report: Report::default(), uptime_ms: 42 }
        }
        fn load(&self) -> Load {
            self.0
        }
        fn set_load(&mut self, load: Load) -> Load {
            self.0 = Load { ws_bytes: load.ws_bytes.min(128 << 20), ..load };
            self.0
        }
    }

    fn ask(guest: &mut Fake, target: &str) -> (String, Option<Command>) {
        let mut out = Answer::new();
        let command = answer(format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes(), guest, &mut out).unwrap();
        assert!(!out.is_cut());
        let text = out.as_str().to_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
        (text, command)
    }

    #[test]
    fn the_paths_there_are() {
        let mut guest = Fake(Load::default());
        let (status, _) = ask(&mut guest, "/status");
        assert!(status.starts_with("HTTP/1.1 200 OK\r\n") && status.contains("\"uptime_ms\":42"), "{status}");
        assert!(ask(&mut guest, "/").0.contains("<html"));
        assert!(ask(&mut guest, "/nothing").0.starts_with("HTTP/1.1 404 "));
        assert_eq!(ask(&mut guest, "/crash").1, Some(Command::Crash));
        assert_eq!(ask(&mut guest, "/poweroff").1, Some(Command::PowerOff));
        assert_eq!(ask(&mut guest, "/reboot").1, Some(Command::Reboot));
    }

    #[test]
    fn the_load_changes_and_the_answer_says_what_is_in_force() {
        let mut guest = Fake(Load::default());
        let (text, _) = ask(&mut guest, "/work?ws=1G&rate=max&pattern=random");
        assert!(
            text.ends_with(
                "{\"ws\":134217728,\"rate\":\"max\",\"pattern\":\"random\",\"verify\":67108864,\"fill\":0,\"zero\":0}\n"
            ),
            "{text}"
        );
        assert_eq!((guest.0.rate, guest.0.pattern), (Rate::Max, Pattern::Random));
        ask(&mut guest, "/work");
        assert_eq!(guest.0.rate, Rate::Max, "nothing asked, nothing changed");
    }

    #[test]
    fn a_bad_setting_changes_nothing() {
        let mut guest = Fake(Load::default());
        for query in ["ws=1G&rate=fast", "colour=red", "ws", "ws=%22"] {
            let (text, _) = ask(&mut guest, &format!("/work?{query}"));
            assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
            assert_eq!(guest.0, Load::default());
        }
    }

    #[test]
    fn what_is_no_request_is_refused_and_what_is_half_waits() {
        let mut guest = Fake(Load::default());
        let mut out = Answer::new();
        assert_eq!(answer(b"", &mut guest, &mut out), None);
        assert_eq!(answer(b"GET / HTTP/1.1\r\nHost:", &mut guest, &mut out), None);
        for bad in ["\n\n", "DELETE / HTTP/1.1\r\n\r\n", "GET /\r\n\r\n", "GET x HTTP/1.1\r\n\r\n", "\u{1}\n\n"] {
            assert_eq!(answer(bad.as_bytes(), &mut guest, &mut out), Some(None), "{bad}");
            assert!(out.as_str().starts_with("HTTP/1.1 400 "), "{bad}");
        }
        assert_eq!(answer(b"GET /\xff HTTP/1.1\n\n", &mut guest, &mut out), Some(None));
        assert!(out.as_str().starts_with("HTTP/1.1 400 "));
        assert_eq!(answer(&[b'a'; MOST_REQUEST_BYTES], &mut guest, &mut out), Some(None));
        assert!(out.as_str().starts_with("HTTP/1.1 400 "));
    }
}
