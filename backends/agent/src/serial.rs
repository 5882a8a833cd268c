//! Serial lines: one conversation, whose ends a line cannot tell.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use tracing::{info, warn};

use crate::AgentError;
use crate::error::one_line;
use crate::port::{OtherEnd, Port};
use crate::service::Service;

/// Between two attempts to open a line that is not there: nothing tells when it is.
const AGAIN: Duration = Duration::from_secs(1);

/// Serves on a line, for ever.
///
/// A header of 16 zero bytes is no frame: it ends a conversation. What follows it at once is thrown away with
/// it, so a host asks for the next conversation until it is answered.
pub(super) async fn serve<S: Service>(path: PathBuf, service: S) -> Result<(), AgentError> {
    let mut said = false;
    loop {
        match open(&path) {
            Ok(mut line) => {
                said = false;
                converse(&mut line, &path, &service).await;
            }
            Err(error) if !said => {
                said = true;
                warn!(path = %blockmount::printable(path.display()), %error, "cannot open the serial line yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Serves one conversation after the other, until the line hangs up.
async fn converse<S: Service>(line: &mut Port, path: &Path, service: &S) {
    while let Ok(OtherEnd::Connected) = line.other_end() {
        if let Err(error) = service.serve(&mut *line).await {
            let error = one_line(&*error);
            warn!(path = %blockmount::printable(path.display()), error, "a connection was given up");
            line.discard();
        }
    }
    info!(path = %blockmount::printable(path.display()), "the serial line hung up");
}

fn open(path: &Path) -> io::Result<Port> {
    let line = Port::open(path)?;
    if isatty(line.file()) {
        let mut settings = tcgetattr(line.file())?;
        // Bytes as they are: no echo, no line ends, no control characters. What has come before was echoed, and a host that reads that
        // takes no answer to it.
        settings.make_raw();
        tcsetattr(line.file(), OptionalActions::Flush, &settings)?;
    }
    Ok(line)
}
