//! The stream to QEMU: commands out, answers to their callers, events to their listeners.

use std::sync::Arc;
use std::time::Duration;

use blockmount_bridge::multiplexer::{Answers, Multiplexer, Unanswered};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tracing::debug;

use super::QmpError;
use super::error::one_line;
use super::events::Listeners;
use super::lines::{Line, LineReader};
use super::message::{Message, Outcome, message};

/// A connection. It is closed when it is dropped.
#[derive(Debug)]
pub(super) struct Link(Multiplexer<Outcome>);

impl Link {
    /// Takes over a stream whose greeting has been read.
    pub(super) fn start<S>(
        reader: LineReader<ReadHalf<S>>,
        writer: WriteHalf<S>,
        listeners: Arc<Listeners>,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let told = listeners.clone();
        let end = move |reason: &Arc<str>| listeners.end(reason);
        Link(Multiplexer::start(
            writer,
            Arc::default(),
            |answers| receive(reader, answers, told),
            end,
        ))
    }

    /// Sends a command, and waits for the answer. `line` makes the line of it from the number it is given.
    pub(super) async fn ask(
        &self,
        command: &str,
        deadline: Duration,
        line: impl FnOnce(u64) -> Result<Vec<u8>, QmpError>,
    ) -> Result<Value, QmpError> {
        let unanswered = |why| {
            let command = command.to_owned();
            match why {
                Unanswered::Lost { reason, .. } => QmpError::Gone { command, reason },
                Unanswered::TimedOut { sent } => QmpError::TimedOut {
                    command,
                    deadline,
                    sent,
                },
            }
        };
        let call = self.0.begin().map_err(unanswered)?;
        let line = line(call.id())?;
        // QEMU does one command after the other.
        let outcome = call.exchange_in_turn(line, deadline).await;
        let outcome = outcome.map_err(unanswered)?;
        outcome.map_err(|refusal| QmpError::Refused {
            command: command.to_owned(),
            class: one_line(&refusal.class),
            desc: one_line(&refusal.desc),
        })
    }

    /// Waits for the end of the connection, and says how it ended.
    pub(super) async fn closed(&self) -> Arc<str> {
        self.0.closed().await
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// Delivers answers and events until the stream ends, and returns the reason.
async fn receive<R: AsyncRead + Unpin>(
    mut reader: LineReader<R>,
    answers: Answers<Outcome>,
    listeners: Arc<Listeners>,
) -> String {
    loop {
        match reader.next().await {
            // Its command is unknown; that call ends by its deadline, and no other.
            Ok(Some(Line::TooLong { bytes })) => {
                debug!(bytes, "skipped a line of QEMU over the limit");
            }
            Ok(Some(Line::Whole(line))) if line.trim_ascii().is_empty() => {}
            Ok(Some(Line::Whole(line))) => match message(line) {
                Ok(Message::Reply { id, outcome }) => answers.deliver(id, outcome),
                Ok(Message::Event(event)) => listeners.tell(event),
                Err(reason) => debug!(reason, "ignored a line of QEMU"),
            },
            Ok(None) => return "QEMU has closed the connection".to_owned(),
            Err(error) => return format!("the connection to QEMU was lost: {error}"),
        }
    }
}
