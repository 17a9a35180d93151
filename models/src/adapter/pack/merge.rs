//! A pack and its segments as one new pack.

use std::io::{Seek, Write};

use crate::Result;

use super::{
    Pack,
    writer::{BasisSite, PackWriter},
};

/// Writes `pack` with all its segments as one file: records and factors are copied, not decoded.
///
/// The new file says which segments it contains; they are ignored beside it, so it may take the
/// old file's place before they are deleted.
///
/// # Errors
/// Bases or a record that do not have the hash that their file gives: the new file would give them theirs.
pub fn merge<W: Write + Seek>(pack: &Pack, out: W) -> Result<W> {
    pack.check_hash()?;
    let mut layout = Vec::new();
    let mut factors = Vec::new();
    for cluster in 0..pack.n_clusters() as u32 {
        let basis = pack.basis(cluster)?;
        for (site, f) in basis.iter() {
            let (u_type, v_type) = (f.stored_u().ty(), f.v().ty());
            let shared_v = pack.v_site(cluster, site) != Some(site);
            layout.push(BasisSite { cluster, site, rank: f.rank(), u_type, v_type, shared_v });
            factors.push((f.stored_u().clone(), f.v().clone()));
        }
    }
    let mut w = PackWriter::new(out, pack.spec().clone(), &layout)?;
    w.set_merged(pack.next_segment().saturating_sub(1));
    for (u, v) in &factors {
        w.copy_factors(u, v)?;
    }
    for (name, slot) in pack.names.iter() {
        let record = pack.record(name, slot);
        record.check_hash()?;
        w.record(name, slot.cluster, slot.err2, record.view()?)?;
    }
    w.finish()
}
