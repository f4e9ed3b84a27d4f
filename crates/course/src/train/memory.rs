//! How many bytes a run has in use.

/// The most bytes in use at the moments of [`sample`](Self::sample), above those at the start.
#[derive(Debug)]
pub(super) struct Memory {
    start: Option<usize>,
    most: usize,
}

impl Memory {
    /// Starts counting from what is in use now; `counted` is whether the tensors lie where the
    /// allocator sees them.
    pub(super) fn start(counted: bool) -> Self {
        Self {
            start: in_use().filter(|_| counted),
            most: 0,
        }
    }

    pub(super) fn sample(&mut self) {
        if let (Some(start), Some(now)) = (self.start, in_use()) {
            self.most = self.most.max(now.saturating_sub(start));
        }
    }

    /// None where nothing can be measured.
    pub(super) fn most(&self) -> Option<usize> {
        self.start.map(|_| self.most)
    }
}

/// The bytes that the process has allocated and not freed: small ones in glibc's arenas, large
/// ones in mappings of their own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(super) fn in_use() -> Option<usize> {
    use std::sync::OnceLock;

    type Mallinfo = unsafe extern "C" fn() -> libc::mallinfo2;
    static MALLINFO: OnceLock<Option<Mallinfo>> = OnceLock::new();

    let mallinfo = MALLINFO.get_or_init(|| {
        // Looked up, not linked: glibc has it since 2.33, and the course runs on older ones.
        // SAFETY: dlsym reads a C string that lives for ever.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"mallinfo2".as_ptr()) };
        // SAFETY: mallinfo2(3) has this signature, and Option<fn> is null where there is none.
        unsafe { std::mem::transmute::<*mut libc::c_void, Option<Mallinfo>>(symbol) }
    });
    // SAFETY: mallinfo2 takes nothing, locks what it reads and returns numbers.
    mallinfo
        .map(|mallinfo| unsafe { mallinfo() })
        .map(|info| info.uordblks + info.hblkhd)
}

/// Other systems do not say.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn in_use() -> Option<usize> {
    None
}
