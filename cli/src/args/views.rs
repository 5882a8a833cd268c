//! Views on the command line: where the tree, or a layer of it, appears as well.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use blockmount::ViewOptions;

/// `DIR[:OPTION,...]`: a place, and what is seen there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) at: PathBuf,
    /// The layer that is seen, from the topmost, which is 1; the tree if none.
    pub(crate) layer: Option<NonZeroUsize>,
    pub(crate) options: ViewOptions,
}

impl FromStr for Shown {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (at, words) = text.rsplit_once(':').unwrap_or((text, ""));
        if at.is_empty() {
            return Err("it names no directory".to_owned());
        }
        let (mut layer, mut subpath, mut flags) = (None, None, Vec::new());
        for word in words.split(',').filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some(("layer", number)) => {
                    let number = number.parse();
                    let number = number.map_err(|_| format!("{word}: layers count from 1"))?;
                    if layer.replace(number).is_some() {
                        return Err("it names two layers".to_owned());
                    }
                }
                Some(("subpath", path)) => {
                    if subpath.replace(path).is_some() {
                        return Err("it names two subpaths".to_owned());
                    }
                }
                _ => flags.push(word),
            }
        }
        let options = ViewOptions::new(flags)
            .and_then(|options| options.with_subpath(subpath.unwrap_or_default()))
            .map_err(|error| error.to_string())?;
        Ok(Shown {
            at: at.into(),
            layer,
            options,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_a_directory_and_what_is_seen_there() {
        let shown: Shown = "/mnt/b:layer=2,ro,nosuid,subpath=usr/share"
            .parse()
            .unwrap();
        let options = ViewOptions::new(["nosuid", "ro"]).unwrap();
        let options = options.with_subpath("usr/share").unwrap();
        assert_eq!(shown.at, PathBuf::from("/mnt/b"));
        assert_eq!(
            (shown.layer, shown.options),
            (NonZeroUsize::new(2), options)
        );
        let plain: Shown = "/mnt/c".parse().unwrap();
        assert_eq!((plain.layer, plain.options), (None, ViewOptions::default()));
        let colon: Shown = "/mnt/c:d:".parse().unwrap();
        assert_eq!(colon.at, PathBuf::from("/mnt/c:d"));
        for wrong in [
            "",
            ":ro",
            "/x:layer=0",
            "/x:layer=1,layer=2",
            "/x:subpath=../y",
            "/x:subpath=a,subpath=b",
            "/x:noload",
            "/x:ro,rw",
        ] {
            assert!(wrong.parse::<Shown>().is_err(), "{wrong:?}");
        }
    }
}
