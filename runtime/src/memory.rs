//! Room for what grows with a request. Where it cannot be had, that request gets an error; a `Vec` that grows by itself
//! would end the process.

use lory_kernels::BackendError;

use crate::Result;

/// Makes room for `more` values behind those of `values`.
///
/// # Errors
/// That there is no memory for `what`.
pub(crate) fn reserve<T>(values: &mut Vec<T>, more: usize, what: &'static str) -> Result<()> {
    values.try_reserve(more).map_err(|_| exhausted::<T>(more, what))
}

/// A copy of `values`.
///
/// # Errors
/// As [`reserve`].
pub(crate) fn copied<T: Copy>(values: &[T], what: &'static str) -> Result<Vec<T>> {
    let mut copy = Vec::new();
    reserve(&mut copy, values.len(), what)?;
    copy.extend_from_slice(values);
    Ok(copy)
}

/// The error for `n` values of T.
pub(crate) fn exhausted<T>(n: usize, what: &'static str) -> crate::Error {
    let bytes = n.saturating_mul(size_of::<T>());
    lory_models::Error::from(BackendError::OutOfMemory { device: "host".into(), what, bytes }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_an_error_with_its_size() {
        let mut values = vec![1u32];
        let error = reserve(&mut values, usize::MAX / 8, "a test").unwrap_err().to_string();
        assert!(error.contains("a test") && error.contains(&(usize::MAX / 8 * 4).to_string()), "{error}");
        assert_eq!(copied(&values, "a test").unwrap(), [1]);
    }
}
