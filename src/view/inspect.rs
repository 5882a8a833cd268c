//! Looking at views.

use super::Viewing;
use crate::inspect::ViewStatus;
use crate::lease::Table;

pub(crate) fn inspect(table: &Table<Viewing>) -> Vec<ViewStatus> {
    table.inspect(|target, up, lease| ViewStatus {
        target: target.to_string_lossy().into_owned(),
        source: up.map(|up| up.bind.source.to_string_lossy().into_owned()),
        lease,
    })
}
