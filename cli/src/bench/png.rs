//! Plots in pixels: the very SVG, drawn. With the feature `png`.

use std::path::Path;
use std::sync::Arc;

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::fontdb::{Database, Family, Query};
use resvg::usvg::{Options, Tree};

use crate::failure::Failure;

/// Pixels for each unit of the SVG: as screens have them.
const SCALE: u32 = 2;

/// The fonts of this machine, of which one is what plots ask for.
pub(crate) struct Letters(Arc<Database>);

impl Letters {
    /// Refuses to draw `file` where there is no font.
    pub(crate) fn of_this_machine(file: &Path) -> Result<Self, Failure> {
        let mut fonts = Database::new();
        fonts.load_system_fonts();
        Self::of(fonts).ok_or_else(|| {
            let what = format!("cannot draw {}", file.display());
            let why = "the letters of a PNG need a font, and none is installed";
            let advice = "install one (Debian: apt-get install fonts-dejavu-core), or name a file that ends in .svg";
            Failure::new(what).because(why).advise(advice)
        })
    }

    fn of(mut fonts: Database) -> Option<Self> {
        let wanted = Query {
            families: &[Family::SansSerif],
            ..Query::default()
        };
        if fonts.query(&wanted).is_none() {
            let families = fonts.faces().filter_map(|face| {
                let (family, _) = face.families.first()?;
                Some((face.monospaced, !family.contains("Sans"), family))
            });
            // By its name: fonts do not say otherwise that they are such.
            let (_, _, best) = families.min()?;
            let best = best.clone();
            fonts.set_sans_serif_family(best);
        }
        Some(Letters(Arc::new(fonts)))
    }

    /// The picture `svg`, which has this size.
    pub(crate) fn png(
        &self,
        svg: &str,
        (width, height): (u32, u32),
    ) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        let options = Options {
            fontdb: Arc::clone(&self.0),
            ..Options::default()
        };
        let tree = Tree::from_str(svg, &options)?;
        let pixels = Pixmap::new(width * SCALE, height * SCALE);
        let mut pixels = pixels.ok_or("there is no memory for it")?;
        let scale = Transform::from_scale(SCALE as f32, SCALE as f32);
        resvg::render(&tree, scale, &mut pixels.as_mut());
        Ok(pixels.encode_png()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_font_nothing_is_drawn() {
        assert!(Letters::of(Database::new()).is_none());
    }
}
