//! What the program says: help and errors as files, so that a change is seen; and advice that can be followed.
//!
//! `BLOCKMOUNT_GOLDEN=write` writes the files anew.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{self, Answer, as_nobody, run};
use blockmount_debug_agent::kit;

/// All commands that a user can know.
const COMMANDS: [&str; 11] = [
    "demo",
    "mount",
    "serve",
    "status",
    "inspect",
    "seal",
    "cleanup",
    "bench",
    "agent",
    "completions",
    "man",
];
/// The columns of the narrowest terminal that help is written for.
const COLUMNS: usize = 80;

/// Compares a text with the file of this name, or writes the file.
#[track_caller]
fn assert_golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("BLOCKMOUNT_GOLDEN").is_some_and(|value| value == "write") {
        return fs::write(path, text).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == text,
        "{} is not what is said now (BLOCKMOUNT_GOLDEN=write changes it):\n{text}",
        path.display()
    );
}

fn help(command: &str) -> String {
    let answer = match command {
        "" => run(["--help"]),
        command => run([command, "--help"]),
    };
    answer.says(0, &[]);
    answer.stdout
}

#[test]
fn the_help_of_each_command_is_as_it_was_and_fits_a_terminal() {
    for command in COMMANDS.iter().chain(&[""]) {
        let text = help(command);
        for line in text.lines() {
            let columns = line.chars().count();
            assert!(columns <= COLUMNS, "{command}: {columns} columns: {line}");
        }
        let name = match *command {
            "" => "help.txt".to_owned(),
            command => format!("help-{command}.txt"),
        };
        assert_golden(&name, &text);
    }
    // None is forgotten.
    for command in COMMANDS {
        assert!(help("").contains(&format!("\n  {command} ")), "{command}");
    }
}

/// Command lines that fail without root, and say why.
const ERRORS: [&[&str]; 30] = [
    &["mount", "--layer", "x"],
    &["mount", "--at", "/mnt/x"],
    &["mount", "--layer", "x", "--at", "/mnt/x"],
    &[
        "mount",
        "--at",
        "/mnt/x",
        "--partition",
        "1",
        "--layer",
        "x",
    ],
    &[
        "mount", "--at", "/mnt/x", "--layer", "x", "--fs", "a", "--fs", "b",
    ],
    &[
        "mount",
        "--at",
        "/mnt/x",
        "--layer",
        "x",
        "--scratch",
        "many",
    ],
    &["mount", "--at", "/mnt/x", "--layer", "x", "--scratch", "1K"],
    &["mount", "--at", "/mnt/x", "--layer", "x", "--colour"],
    &["mount", "--resume", "a", "--layer", "x"],
    &[
        "mount",
        "--at",
        "/mnt/x",
        "--layer",
        "x",
        "--transport",
        "usb",
    ],
    &[
        "mount", "--at", "/mnt/x", "--layer", "x", "--luks", "phrase",
    ],
    &[
        "mount", "--at", "/mnt/x", "--layer", "x", "--luks", "a:b", "--key", "a:b",
    ],
    &[
        "mount",
        "--guest",
        "qemu",
        "--at",
        "/mnt/x",
        "--layer",
        "x",
        "--luks",
        "file=absent",
    ],
    &["mount", "--file", "absent.toml"],
    &["mount", "--file", "empty"],
    &["mount", "--file", "typo.toml"],
    &["mount", "--file", "value.toml"],
    &["mount", "--file", "bare.toml", "--encrypt"],
    &["mount", "--file", "cut.toml"],
    &["mount", "--file", "bare.toml"],
    &["demo"],
    &["inspect"],
    &["inspect", "absent"],
    &["inspect", "gzip", "zstd", "xz", "bzip2"],
    &["inspect", "qcow2"],
    &["inspect", "--log", "debgu", "blank"],
    &["seal", "empty"],
    &["agent", "--vsock-listen", "7"],
    &["agent", "--log", "debgu"],
    &["agent", "--vsock", "many"],
];

#[test]
fn errors_are_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, start: &[u8], length: usize| {
        let mut bytes = start.to_vec();
        bytes.resize(length, 0);
        fs::write(dir.path().join(name), bytes).unwrap();
    };
    file("blank", b"", 1 << 20);
    file("empty", b"", 0);
    file("gzip", b"\x1f\x8b\x08", 4096);
    file("zstd", b"\x28\xb5\x2f\xfd", 4096);
    file("xz", b"\xfd7zXZ\0", 4096);
    file("bzip2", b"BZh9", 4096);
    file("qcow2", b"QFI\xfb\0\0\0\x03", 4096);
    let stack = |name: &str, text: &str| file(name, text.as_bytes(), text.len());
    let bare = "at = \"tree\"\n\n[[layer]]\nimage = \"app.erofs\"\n";
    stack("bare.toml", bare);
    stack("typo.toml", &bare.replace("image", "imgae"));
    stack("value.toml", &format!("{bare}partition = \"two\"\n"));
    stack("cut.toml", &bare[..bare.len() - 2]);
    let mut text = String::new();
    for words in ERRORS {
        let answer = nobody(dir.path(), words);
        assert_ne!(answer.code, Some(0), "{words:?}: {answer}");
        assert!(answer.stderr.starts_with("error: "), "{words:?}: {answer}");
        let code = answer.code.unwrap();
        let line = words.join(" ");
        text += &format!("$ blockmount {line}\n{}[{code}]\n\n", answer.stderr);
    }
    assert_golden("errors.txt", &text);
}

/// Mounts that fail, and say why.
const REFUSED: [&[&str]; 25] = [
    &["--layer", "absent"],
    &["--layer", "blank"],
    &["--layer", "gzip"],
    &["--layer", "zstd"],
    &["--layer", "cut"],
    &["--layer", "empty"],
    &["--layer", "odd"],
    &["--layer", "qcow2"],
    &["--layer", "."],
    &["--layer", "/dev/null"],
    &["--layer", "disk"],
    &["--layer", "disk", "--partition", "7"],
    &["--layer", "good", "--partition", "1"],
    &["--layer", "good", "--fs", "xfs"],
    &["--layer", "good", "--option", "rw"],
    &["--layer", "good", "--option", "no_such_option"],
    &["--layer", "good", "--verity", "absent.dmverity"],
    &["--layer", "good", "--transport", "auto"],
    &["--layer", "top.qcow2"],
    &["--layer", "good.vhd"],
    &["--layer", "good.qcow2", "--name", "x"],
    &["--layer", "disk.vmdk"],
    &["--layer", "good", "--guest", "qemu", "--name", "x"],
    &["--layer", "good", "--guest", "qemu", "--at", "/etc/tree"],
    &["--layer", "good", "--at", "full"],
];

#[test]
fn root_errors_of_mounts_are_as_they_were() {
    let dir = common::temp();
    let path = |name: &str| dir.path().join(name);
    let file = |name: &str, bytes: &[u8], length: usize| {
        let mut bytes = bytes.to_vec();
        bytes.resize(length, 0);
        fs::write(path(name), bytes).unwrap();
    };
    common::image("ext4", path("good"), &[("file", "text")]);
    common::partitioned(path("disk"), &[("file", "text")]);
    let good = fs::read(path("good")).unwrap();
    file("cut", &good[..1 << 20], 1 << 20);
    file("odd", &good, good.len() + 100);
    file("blank", b"", 1 << 20);
    file("empty", b"", 0);
    file("gzip", b"\x1f\x8b\x08", 4096);
    file("zstd", b"\x28\xb5\x2f\xfd", 4096);
    file("qcow2", b"QFI\xfb\0\0\0\x03", 4096);
    file("disk.vmdk", b"KDMV\x01\0\0\0", 4096);
    file("good.vhd", &good, good.len());
    let backing = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "good",
        "-F",
        "raw",
        "top.qcow2",
    ];
    let mut qemu_img = Command::new("qemu-img");
    qemu_img.args(backing).current_dir(dir.path());
    assert!(qemu_img.status().unwrap().success());
    fs::create_dir(path("full")).unwrap();
    file("full/x", b"", 0);
    let mut text = String::new();
    for words in REFUSED {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockmount"));
        command.arg("mount").args(words).current_dir(dir.path());
        let at = ["--at", "/mnt/tree"];
        match words.contains(&"--at") || words.contains(&"qemu") {
            true if words.contains(&"--at") => {}
            true => drop(command.args(at)),
            false => drop(command.args(["--at", "tree"])),
        }
        let answer = kit::run(command);
        assert!(matches!(answer.code, Some(1 | 2)), "{words:?}: {answer}");
        let said = normal(&answer.stderr, &dir.path().display().to_string());
        text += &format!(
            "$ blockmount mount {}\n{said}[{}]\n\n",
            words.join(" "),
            answer.code.unwrap()
        );
    }
    assert_golden("errors-of-mounts.txt", &text);
    assert!(
        !text.contains("/run/blockmount/"),
        "a path that is ours alone: {text}"
    );
    assert!(common::in_kernel(dir.path().file_name().unwrap()).is_empty());
}

/// Without what differs from run to run: the directory, and the kernel's numbers.
fn normal(text: &str, directory: &str) -> String {
    let text = text.replace(directory, "DIR");
    let mut normal = String::new();
    let mut rest = text.as_str();
    let numbered = ["/dev/loop", "block device 7:"];
    while let Some((at, name)) = numbered
        .iter()
        .filter_map(|name| Some((rest.find(name)?, *name)))
        .min()
    {
        let end = at + name.len();
        normal += &rest[..end];
        normal.push('N');
        rest = rest[end..].trim_start_matches(|digit: char| digit.is_ascii_digit());
    }
    normal + rest
}

/// Runs the program by a user who may do nothing, in a directory.
fn nobody(dir: &Path, words: &[&str]) -> Answer {
    let mut command = as_nobody(dir, words);
    command.current_dir(dir).env_remove("SUDO_UID");
    kit::run(command)
}

/// The texts in the source of the program: what is between quotes, outside of tests and comments.
fn literals() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let source = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            found.extend(quoted(source).into_iter().map(|text| (path.clone(), text)));
        }
    }
    found
}

fn quoted(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let code = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let code: String = code.collect::<Vec<_>>().join("\n").replace("'\"'", "");
    let mut rest = code.chars().peekable();
    while let Some(character) = rest.next() {
        if character != '"' {
            continue;
        }
        let mut text = String::new();
        while let Some(character) = rest.next() {
            match character {
                '"' => break,
                '\\' => match rest.next().unwrap() {
                    '\n' => while rest.next_if(|next| next.is_whitespace()).is_some() {},
                    'n' => text.push('\n'),
                    escaped => text.push(escaped),
                },
                character => text.push(character),
            }
        }
        found.push(text);
    }
    found
}

/// The commands of this program in a text, up to where each ends, with something in each place that is to be filled.
fn commands_in(text: &str) -> Vec<Vec<String>> {
    // A command that goes on in the next line is one.
    let lines = text.split("\\\n").map(str::trim);
    let text = &lines.collect::<Vec<_>>().join(" ");
    let starts = text.match_indices("blockmount ");
    let commands = starts.filter_map(|(at, name)| {
        let rest = &text[at + name.len()..];
        // Within a word they are of an argument.
        let is_end = |(at, sign): &(usize, char)| match sign {
            ',' | ':' => rest[at + 1..]
                .chars()
                .next()
                .is_none_or(char::is_whitespace),
            sign => "\";\n()>|#".contains(*sign),
        };
        let end = rest.char_indices().find(is_end).map(|(at, _)| at);
        let rest = &rest[..end.unwrap_or(rest.len())];
        // Two spaces divide an example from what is said of it.
        let rest = rest.split("  ").next()?.trim_end_matches('\\');
        let words: Vec<String> = rest.split_whitespace().map(filled).collect();
        let is_command = words
            .first()
            .is_some_and(|word| COMMANDS.contains(&&**word));
        is_command.then_some(words)
    });
    commands.collect()
}

fn filled(word: &str) -> String {
    let is_place = word == "NAME" || word == "IMAGE" || word == "...";
    match word.split_once('{') {
        // What may follow a word is left out, and what stands for one is filled in.
        Some((before, _)) if !before.is_empty() => before.to_owned(),
        Some(_) => "x".to_owned(),
        None if is_place => "x".to_owned(),
        None => word.to_owned(),
    }
}

/// Whoever is told to run a command must not be told then that there is no such one.
#[test]
fn u17_each_command_that_is_advised_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let all = literals();
    let mut commands: BTreeSet<Vec<String>> = BTreeSet::new();
    for (_, text) in &all {
        commands.extend(commands_in(text));
    }
    assert!(commands.len() > 25, "only {commands:?} were found");
    for command in commands {
        // It would go on for ever.
        if command[0] == "agent" {
            continue;
        }
        let mut words: Vec<&str> = command.iter().map(String::as_str).collect();
        if words.contains(&"qemu") || words.contains(&"--watch") {
            // Any user may do that, and it takes its time, or has no end.
            words.push("--help");
        }
        let mut answer = nobody(dir.path(), &words);
        if answer.code == Some(2) && command.len() == 1 {
            // The name of a command, and no more.
            answer = nobody(dir.path(), &[words[0], "--help"]);
        }
        assert_ne!(answer.code, Some(2), "{command:?}: {answer}");
    }
}

#[test]
fn u17_each_option_that_is_advised_is_one() {
    let help: String = COMMANDS.iter().map(|command| help(command)).collect();
    let known: BTreeSet<&str> = options(&help).collect();
    // Those of other programs, which are named with them.
    let others = ["--size", "--long", "--word"];
    let mut checked = 0;
    for (path, text) in literals() {
        for option in options(&text).filter(|option| !others.contains(option)) {
            let path = path.display();
            assert!(
                known.contains(option),
                "{path}: there is no {option}: {text:?}"
            );
            checked += 1;
        }
    }
    assert!(checked > 40, "only {checked} options were found");
}

fn options(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|character: char| !character.is_ascii_lowercase() && character != '-');
    words.filter(|word| {
        let name = word.strip_prefix("--");
        name.is_some_and(|name| name.starts_with(|first: char| first.is_ascii_lowercase()))
    })
}

#[test]
fn the_scripts_for_shells_and_the_manual_pages_know_all_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let answer = run(["completions", shell]);
        answer.says(0, &[]);
        for command in COMMANDS {
            assert!(answer.stdout.contains(command), "{shell}: {command}");
        }
    }
    let bash = run(["completions", "bash"]).stdout;
    let is_command = |command: &str| bash.contains(&format!("blockmount,{command})"));
    assert!(
        is_command("agent") && !is_command("checker"),
        "what is for guests"
    );
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    fs::write(&script, bash).unwrap();
    let checked = Command::new("bash")
        .arg("-n")
        .arg(&script)
        .status()
        .unwrap();
    assert!(checked.success());

    run([OsStr::new("man"), "--to".as_ref(), dir.path().as_os_str()]).says(0, &[]);
    for command in COMMANDS {
        let page = fs::read_to_string(dir.path().join(format!("blockmount-{command}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{command}: {page}");
    }
    let page = run(["man"]).stdout;
    assert!(
        page.contains(".TH blockmount")
            && page == fs::read_to_string(dir.path().join("blockmount.1")).unwrap()
    );
}

#[test]
fn colours_are_there_when_they_are_asked_for() {
    let escape = '\u{1b}';
    let coloured = |words: &[&str], no_color: Option<&str>| {
        let mut command = common::program(words);
        match no_color {
            Some(value) => command.env("NO_COLOR", value),
            None => command.env_remove("NO_COLOR"),
        };
        let answer = kit::run(command);
        answer.stderr.contains(escape) || answer.stdout.contains(escape)
    };
    for words in [
        &["inspect", "/absent"][..],
        &["mount", "--help"],
        &["mount", "--nonsense"],
    ] {
        let with = |choice: &'static str| [&["--color", choice], words].concat();
        assert!(coloured(&with("always"), None), "{words:?}");
        assert!(coloured(&with("always"), Some("1")), "{words:?}");
        assert!(!coloured(&with("never"), None), "{words:?}");
        assert!(!coloured(&with("auto"), None), "no terminal: {words:?}");
    }
}
