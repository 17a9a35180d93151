//! Structs that grow: a program built with an older or a newer header passes what it knows.

use std::{marker::PhantomData, ptr, ptr::NonNull};

use crate::status::{Failure, Result, lory_status::*};

/// A struct of the header that begins with its size.
///
/// # Safety
/// `repr(C)`, its first field is `struct_size: usize`, and every pattern of bytes is valid, so
/// that a beginning copied from the caller is too.
pub(crate) unsafe trait Versioned: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Its size in the first version of the header.
    const FIRST: usize;
    /// What fields that the caller does not know of are.
    fn defaults() -> Self;
}

/// Declares a [`Versioned`] struct, whose first version ended with the field `last_of_first`. Its
/// fields are zero by default; a function may change some of them.
macro_rules! versioned {
    ($name:ident, last_of_first = $last:ident) => {
        crate::structs::versioned!($name, last_of_first = $last, |zeroed| zeroed);
    };
    ($name:ident, last_of_first = $last:ident, $fill:expr) => {
        // SAFETY: `repr(C)`, `struct_size: usize` first, and only integers, floats and pointers.
        unsafe impl crate::structs::Versioned for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST: usize =
                (std::mem::offset_of!($name, $last) + 1).next_multiple_of(align_of::<$name>());
            fn defaults() -> Self {
                // SAFETY: every pattern of bytes is valid.
                let zeroed: Self = unsafe { std::mem::zeroed() };
                let fill: fn(Self) -> Self = $fill;
                fill($name { struct_size: size_of::<$name>(), ..zeroed })
            }
        }
        const _: () = assert!(std::mem::offset_of!($name, struct_size) == 0);
    };
}
pub(crate) use versioned;

fn wrong_size<T: Versioned>(size: usize) -> Failure {
    let text = format!(
        "{}.struct_size is {size}, expected {} to {}: initialise the struct with {}_init",
        T::NAME,
        T::FIRST,
        size_of::<T>(),
        T::NAME
    );
    Failure::new(LORY_E_STRUCT_SIZE, text)
}

/// A program that knows a field of more than this is not a program.
const LARGEST: usize = 64 << 10;

/// The caller's struct; NULL is the defaults.
///
/// # Safety
/// `ptr` is NULL or as many bytes as its `struct_size` says are readable.
pub(crate) unsafe fn read<T: Versioned>(ptr: *const T) -> Result<T> {
    let mut value = T::defaults();
    if ptr.is_null() {
        return Ok(value);
    }
    // SAFETY: the struct begins with its size; callers may have packed it.
    let size = unsafe { ptr.cast::<usize>().read_unaligned() };
    if !(T::FIRST..=LARGEST).contains(&size) {
        return Err(wrong_size::<T>(size));
    }
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes are readable, `known` of them fit, and any bytes are a valid `T`.
    unsafe { ptr::copy_nonoverlapping(ptr.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    for i in known..size {
        // SAFETY: within the caller's struct.
        if unsafe { ptr.cast::<u8>().add(i).read() } != 0 {
            let text = format!("{} sets a field at byte {i} that this library does not have", T::NAME);
            return Err(Failure::new(LORY_E_UNSUPPORTED, text));
        }
    }
    Ok(value)
}

/// The caller's place for a struct, whose size is checked.
pub(crate) struct Place<'a, T> {
    place: NonNull<T>,
    size: usize,
    lifetime: PhantomData<&'a mut T>,
}

/// The place for a struct whose `struct_size` the caller has set.
///
/// # Safety
/// `ptr` is NULL or as many bytes as its `struct_size` says are readable and writable for `'a`.
pub(crate) unsafe fn place<'a, T: Versioned>(ptr: *mut T) -> Result<Place<'a, T>> {
    let Some(place) = NonNull::new(ptr) else {
        return Err(Failure::new(LORY_E_NULL, format!("the place for a {} is NULL", T::NAME)));
    };
    // SAFETY: the struct begins with its size.
    let size = unsafe { place.cast::<usize>().read_unaligned() };
    if !(T::FIRST..=LARGEST).contains(&size) {
        return Err(wrong_size::<T>(size));
    }
    Ok(Place { place, size, lifetime: PhantomData })
}

impl<T: Versioned> Place<'_, T> {
    /// Writes the fields that the caller knows; `struct_size` stays.
    pub(crate) fn set(&self, value: &T) {
        let (from, to) = (ptr::from_ref(value).cast::<u8>(), self.place.as_ptr().cast::<u8>());
        let (head, known) = (size_of::<usize>(), self.size.min(size_of::<T>()));
        // SAFETY: `known` bytes are there on both sides, and one is ours.
        unsafe { ptr::copy_nonoverlapping(from.add(head), to.add(head), known - head) };
    }
}

/// Fills a struct of `size` bytes with its defaults.
///
/// # Safety
/// `ptr` is NULL or `size` bytes are writable.
pub(crate) unsafe fn init<T: Versioned>(ptr: *mut T, size: usize) -> Result<()> {
    if ptr.is_null() {
        return Err(Failure::new(LORY_E_NULL, format!("the place for a {} is NULL", T::NAME)));
    }
    if !(T::FIRST..=LARGEST).contains(&size) {
        return Err(wrong_size::<T>(size));
    }
    // SAFETY: `size` bytes are writable.
    unsafe {
        ptr.cast::<u8>().write_bytes(0, size);
        ptr.cast::<usize>().write_unaligned(size);
    }
    // SAFETY: as above; its size is what was just written.
    unsafe { place(ptr) }?.set(&T::defaults());
    Ok(())
}
