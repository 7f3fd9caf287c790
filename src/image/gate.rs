//! What an image may refer to, and opening a chain through that gate.
//!
//! A header is written by whoever made the image, perhaps the guest: it must not choose which of
//! the host's files are read. A format is never guessed, references are plain names below the
//! image's directory or a directory the operator named, and each refusal says which flag allows it.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::image::chain::Layer;
use crate::image::policy::Policy;
use crate::qcow2::create::CreateOptions;
use crate::qcow2::header::Header;
use crate::qcow2::open::{Parts, read_header, repair_dirty};
use crate::qcow2::{CacheSizes, Inflated, InflatedBytes, Inflaters, Qcow2};
use crate::raw::Raw;
use crate::storage::{FileSource, OpenMode, Opened, Storage};
use crate::sync::Arc;

/// Most layers of a chain.
pub(super) const DEPTH_LIMIT: usize = 64;

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2, versions 2 and 3.
    Qcow2,
}

/// What the operator said of an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The image's format. Without it the file must have qcow2's magic.
    pub format: Option<Format>,
    /// Refuse writes, and open every file for reading only.
    pub read_only: bool,
    /// Directories that references may lead into, beside the image's own.
    pub allow_paths: Vec<PathBuf>,
    /// The format of backing files that have none recorded.
    pub backing_format: Option<Format>,
    /// Memory for tables, for each qcow2 layer.
    pub caches: CacheSizes,
    /// Memory for inflated clusters, for all layers together.
    pub inflated: InflatedBytes,
    /// Most threads that inflate clusters beside those who read them; with none, these do it.
    pub inflaters: usize,
    /// Compress what the guest writes, where it writes whole clusters to a new place.
    pub compress: bool,
    /// What becomes of discards and of zeros.
    pub policy: Policy,
}

impl Image {
    /// Opens the image at `path` and every file it refers to.
    ///
    /// # Errors
    /// One sentence that names the file, what was wrong, and what would help. Nothing was written,
    /// except that an image which had not been closed may have been repaired first.
    pub async fn open(
        st: &dyn Storage,
        source: &dyn FileSource,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self> {
        let gate = Gate::new(st, source, path, options)?;
        let layers = gate.open_chain(path).await?;
        let mut image = Self::from_layers(layers, options.read_only).with_policy(options.policy);
        (image.inflated, image.compress) = (gate.inflated, options.compress);
        image.inflaters = Inflaters::new(options.inflaters);
        image.name = path.display().to_string().into();
        if options.compress {
            image.compressible().map_err(|error| error.within(path.display()))?;
        }
        Ok(image)
    }
}

/// Makes an empty qcow2 image at `path`, which must not exist.
///
/// # Errors
/// `Refused` and `Unsupported` before anything is made, when options contradict each other, the
/// layout is out of range or needs a data file; then I/O errors, also when the file exists.
pub async fn create(
    st: &dyn Storage,
    source: &dyn FileSource,
    path: &Path,
    options: &CreateOptions,
) -> Result<()> {
    let within = |error: Error| error.within(path.display());
    options.check().map_err(within)?;
    if options.data_file.is_some() {
        let why = "an image with a data file is made by image::make::make";
        return Err(Error::unsupported(path.display().to_string(), why));
    }
    let file = source.create(path)?;
    let made = crate::qcow2::create::create(st, file, None, options).await;
    made.map_err(within)
}

pub(super) struct Gate<'a> {
    st: &'a dyn Storage,
    source: &'a dyn FileSource,
    options: &'a OpenOptions,
    /// Directories that references may lead into, links resolved.
    roots: Vec<PathBuf>,
    inflated: Arc<Inflated>,
}

/// A file to open as the next layer.
pub(super) struct Next {
    pub(super) path: PathBuf,
    pub(super) format: Option<Format>,
}

impl<'a> Gate<'a> {
    pub(super) fn new(
        st: &'a dyn Storage,
        source: &'a dyn FileSource,
        path: &Path,
        options: &'a OpenOptions,
    ) -> Result<Self> {
        let mut roots = vec![source.canonical(&directory(path))?];
        for path in &options.allow_paths {
            roots.push(source.canonical(path)?);
        }
        let inflated = Arc::new(Inflated::new(options.inflated));
        Ok(Self { st, source, options, roots, inflated })
    }

    /// Memory for inflated clusters, which all layers share.
    pub(super) fn inflated(&self) -> Arc<Inflated> {
        Arc::clone(&self.inflated)
    }

    /// The image at `path` without the files that it refers to: its tables, but not its data.
    pub(super) async fn open_alone(&self, path: &Path) -> Result<Image> {
        let read_only = self.options.read_only;
        let file = self.source.open(path, OpenMode { read_only, backing: false })?;
        let layer = match self.options.format {
            Some(Format::Raw) => Layer::Raw(Raw::new(file.id, file.length)),
            Some(Format::Qcow2) | None => {
                let (file, header) = self.read_header(path, file, read_only).await?;
                let backed = header.backing.is_some();
                let image =
                    self.open_parts(path, (file, header), None, (backed, read_only)).await?;
                Layer::Qcow2(Box::new(image))
            }
        };
        let mut image = Image::from_layers(vec![layer], read_only);
        image.name = path.display().to_string().into();
        Ok(image)
    }

    pub(super) async fn open_chain(&self, path: &Path) -> Result<Vec<Layer>> {
        let read_only = self.options.read_only;
        self.open_layers(path, &mut |depth, _| depth == 0 && !read_only).await
    }

    /// Opens a chain, those of its files for writing of whose depth and path `writes` says so.
    pub(super) async fn open_layers(
        &self,
        path: &Path,
        writes: &mut dyn FnMut(usize, &Path) -> bool,
    ) -> Result<Vec<Layer>> {
        let mut next = Some(Next { path: path.to_owned(), format: self.options.format });
        let mut layers = Vec::new();
        let mut seen = Vec::new();
        while let Some(here) = next.take() {
            let name = here.path.display().to_string();
            if layers.len() >= DEPTH_LIMIT {
                let why = format!(
                    "the backing chain is deeper than {DEPTH_LIMIT} layers; \
                     flatten it with rebase -b '' or convert"
                );
                return Err(Error::refused(name, why));
            }
            let backing = !layers.is_empty();
            let read_only = !writes(layers.len(), &here.path);
            let file = self.source.open(&here.path, OpenMode { read_only, backing })?;
            self.refuse_cycle(&name, file, &mut seen)?;
            let layer;
            (layer, next) = match here.format {
                Some(Format::Raw) => (Layer::Raw(Raw::new(file.id, file.length)), None),
                Some(Format::Qcow2) | None => {
                    self.open_qcow2(&here.path, file, read_only, &mut seen).await?
                }
            };
            layers.push(layer);
        }
        Ok(layers)
    }

    pub(super) fn refuse_cycle(
        &self,
        name: &str,
        file: Opened,
        seen: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        if seen.contains(&file.identity) {
            let why = "the file is part of its own backing chain; rebase the image that refers to \
                       it with rebase -u";
            return Err(Error::refused(name, why));
        }
        seen.push(file.identity);
        Ok(())
    }

    async fn open_qcow2(
        &self,
        path: &Path,
        file: Opened,
        read_only: bool,
        seen: &mut Vec<(u64, u64)>,
    ) -> Result<(Layer, Option<Next>)> {
        let (file, header) = self.read_header(path, file, read_only).await?;
        let next = self.backing(path, &header)?;
        let data = self.open_data_file(path, &header, read_only, seen)?;
        let opening = (next.is_some(), read_only);
        let image = self.open_parts(path, (file, header), data, opening).await?;
        Ok((Layer::Qcow2(Box::new(image)), next))
    }

    /// Reads a header; an image that was not closed and is to be written to is repaired first.
    async fn read_header(
        &self,
        path: &Path,
        file: Opened,
        read_only: bool,
    ) -> Result<(Opened, Header)> {
        let name = path.display().to_string();
        let header = read_header(self.st, &name, file).await?;
        if read_only {
            return Ok((file, header));
        }
        repair_dirty(self.st, &name, file, header).await
    }

    async fn open_parts(
        &self,
        path: &Path,
        (file, header): (Opened, Header),
        data: Option<Opened>,
        (backed, read_only): (bool, bool),
    ) -> Result<Qcow2> {
        let data = data.map(|file| file.id);
        let parts = Parts { data, backed, read_only, caches: self.options.caches };
        let name = path.display().to_string();
        let image = Qcow2::open(self.st, &name, file, header, parts).await?;
        Ok(image.with_inflated(self.inflated()))
    }

    pub(super) fn backing(&self, path: &Path, header: &Header) -> Result<Option<Next>> {
        let Some(reference) = &header.backing else { return Ok(None) };
        let format = match header.backing_format.as_deref() {
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => {
                let why = format!(
                    "its backing file {reference} has the format {other}, which is \
                                   not supported; only raw and qcow2 are"
                );
                return Err(Error::unsupported(path.display().to_string(), why));
            }
            None => self.options.backing_format.ok_or_else(|| {
                let why = format!(
                    "the format of its backing file {reference} is not recorded; \
                                   pass --backing-format raw or qcow2"
                );
                Error::refused(path.display().to_string(), why)
            })?,
        };
        let path = self.admit(path, "backing file", reference)?;
        Ok(Some(Next { path, format: Some(format) }))
    }

    fn open_data_file(
        &self,
        path: &Path,
        header: &Header,
        read_only: bool,
        seen: &mut Vec<(u64, u64)>,
    ) -> Result<Option<Opened>> {
        if !header.geometry.rules.data_file {
            return Ok(None);
        }
        let Some(reference) = &header.data_file else {
            let why = "it has an external data file whose name is not recorded; record it with \
                       amend -o data_file=NAME";
            return Err(Error::refused(path.display().to_string(), why));
        };
        let target = self.admit(path, "data file", reference)?;
        let file = self.source.open(&target, OpenMode { read_only, backing: false })?;
        self.refuse_cycle(&target.display().to_string(), file, seen)?;
        Ok(Some(file))
    }

    /// Turns a reference into a path that may be opened.
    pub(super) fn admit(&self, from: &Path, what: &str, reference: &str) -> Result<PathBuf> {
        refuse_protocol(from, what, reference)?;
        let path = directory(from).join(reference);
        let target = self.resolve(from, what, &path, &path)?;
        self.refuse_outside(from, what, target)
    }

    /// Turns a reference to a file that may be made into its path.
    pub(super) fn admit_new(&self, from: &Path, what: &str, reference: &str) -> Result<PathBuf> {
        let path = directory(from).join(reference);
        let Some(name) = path.file_name().filter(|_| !self.exists(&path)) else {
            return self.admit(from, what, reference);
        };
        refuse_protocol(from, what, reference)?;
        let parent = self.resolve(from, what, &path, &directory(&path))?;
        self.refuse_outside(from, what, parent.join(name))
    }

    fn exists(&self, path: &Path) -> bool {
        self.source.canonical(path).is_ok()
    }

    /// `path`, which the reference to `shown` needs, with all links resolved.
    fn resolve(&self, from: &Path, what: &str, shown: &Path, path: &Path) -> Result<PathBuf> {
        self.source.canonical(path).map_err(|error| match error.kind() {
            Kind::Io(source) => {
                let why = format!("its {what} {} cannot be opened: {source}", shown.display());
                Error::refused(from.display().to_string(), why)
            }
            _ => error,
        })
    }

    /// Lets through what lies in a directory that references may lead into.
    fn refuse_outside(&self, from: &Path, what: &str, target: PathBuf) -> Result<PathBuf> {
        let refuse = |why: String| Err(Error::refused(from.display().to_string(), why));
        if self.roots.iter().any(|root| target.starts_with(root)) {
            return Ok(target);
        }
        let parent = target.parent().unwrap_or(&target).display();
        refuse(format!(
            "its {what} {} lies outside the image's directory; to allow it pass \
             --allow-path {parent}",
            target.display()
        ))
    }
}

/// Refuses references that are no plain file names.
fn refuse_protocol(from: &Path, what: &str, reference: &str) -> Result<()> {
    let protocol = reference.split_once(':').is_some_and(|(before, _)| !before.contains('/'));
    if !protocol {
        return Ok(());
    }
    let why = format!(
        "its {what} is given as {reference:?}; only plain file names are opened, so record one \
         with rebase -u"
    );
    Err(Error::refused(from.display().to_string(), why))
}

/// The directory that a file's references are relative to.
pub(super) fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.components().next().is_some() => parent.to_owned(),
        _ if path.components().next() == Some(Component::RootDir) => PathBuf::from("/"),
        _ => PathBuf::from("."),
    }
}
