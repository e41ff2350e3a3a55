//! The recordings' format: `## heading`, `lb# command`, its output (stdout and stderr together), `[exit N]`.

/// What happens in a recording, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    Heading(String),
    /// Where it is typed ("lb#", "client#", "lb$"), what, its output's lines, and the exit code where it was noted.
    Typed {
        at: String,
        command: String,
        output: Vec<String>,
        exit: Option<u8>,
    },
    /// A line that belongs to no command.
    Loose(String),
}

/// Splits a recording. Trailing blanks are kept.
pub fn parse(text: &str) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    let mut open = false;
    for line in text.strip_suffix('\n').unwrap_or(text).split('\n') {
        let prompt = ["lb# ", "client# ", "lb$ "].into_iter().find(|p| line.starts_with(p));
        if let Some(heading) = line.strip_prefix("## ") {
            events.push(Event::Heading(heading.to_owned()));
            open = false;
        } else if let Some(prompt) = prompt {
            let command = line[prompt.len()..].to_owned();
            let at = prompt.trim_end().to_owned();
            events.push(Event::Typed { at, command, output: Vec::new(), exit: None });
            open = true;
        } else if open && let Some(Event::Typed { output, exit, .. }) = events.last_mut() {
            let code = line.strip_prefix("[exit ").and_then(|rest| rest.strip_suffix(']'));
            match code.and_then(|c| c.parse().ok()) {
                Some(code) => {
                    *exit = Some(code);
                    open = false;
                }
                None => output.push(line.to_owned()),
            }
        } else {
            events.push(Event::Loose(line.to_owned()));
        }
    }
    events
}

#[test]
fn outputs_and_exits_go_with_their_commands() {
    let text = "## a\nlb# x \nout \n[exit 2]\nloose\nlb# y\n[    1.0] log\n## b\n";
    let typed = |command: &str, output: &[&str], exit| Event::Typed {
        at: "lb#".into(),
        command: command.into(),
        output: output.iter().map(|s| (*s).to_owned()).collect(),
        exit,
    };
    assert_eq!(
        parse(text),
        [
            Event::Heading("a".into()),
            typed("x ", &["out "], Some(2)),
            Event::Loose("loose".into()),
            typed("y", &["[    1.0] log"], None),
            Event::Heading("b".into()),
        ]
    );
}
