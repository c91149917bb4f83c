"""Everything quantscope raises on purpose.

    QuantscopeError                       exit code 2, one paragraph, never a traceback
    ├── UsageError                        options that contradict each other, empty prompt, token id out of range
    │   └── PromptError                   empty, longer than the context, id ≥ n_vocab, undecodable text
    ├── ModelFileError                    the file (or folder) cannot be used
    │   ├── MissingFileError              no such file, a folder without config.json, a missing shard
    │   ├── NotAModelError                not a GGUF file and not a Hugging Face folder
    │   ├── UnsupportedVersionError       GGUF v1, big-endian GGUF, a future version
    │   ├── TruncatedFileError            the header or a tensor ends past the end of the file
    │   ├── CorruptFileError              a header that contradicts itself
    │   ├── UnsupportedTypeError          a tensor type this program does not know
    │   └── VocabularyError               no vocabulary, or one this program cannot use; token ids can be given instead of text
    ├── TensorError                       one tensor's values or shape
    │   ├── MissingTensorError            the architecture needs it, the file lacks it
    │   ├── ShapeError                    expected and found shapes differ
    │   ├── NonFiniteError                NaN or infinity where numbers must be finite
    │   └── BlockError                    no block of this type fits the rows
    ├── UnsupportedArchitectureError      named, with the list of supported ones
    ├── UnsupportedFeatureError           a metadata key that changes the forward and is not implemented
    ├── StudyFolderError                  the folder that keeps a study's finished batches cannot be used
    │   ├── StudyLockedError              another process is at work in it
    │   ├── StudyMismatchError            another study: other options, files, plan or version
    │   ├── StudyFormatError              not the database of a study, or of a version this program does not know
    │   ├── StudyDamagedError             the database or one of its records has changed since it was written
    │   └── StudyDiskError                the disk is full, not writable or failing
    ├── ClusterError                      the machines of a cluster could not finish a batch
    ├── EngineError                       another engine refused the model, failed or died; carries its own words
    ├── TraceError                        a trace cannot be used
    │   ├── TraceFormatError              the file is no trace, or of a version this program does not know
    │   ├── TraceContentError             a tap, position or kind of evidence that the task needs is not there
    │   └── TraceMismatchError            two traces of different tokens or files
    ├── ImportFormatError                 a log, dump or table that cannot be read: cut short, several runs in one, no known line
    └── MissingExtraError                 an optional package is not installed; names the command that installs it

A message names the subject, what was expected and found, the likely cause and the next command, in one paragraph.
"""

from __future__ import annotations


class QuantscopeError(Exception):
    """Base of all expected errors; ``str(error)`` is ready to print."""

    exit_code = 2


class UsageError(QuantscopeError):
    pass


class PromptError(UsageError):
    pass


class ModelFileError(QuantscopeError):
    pass


class MissingFileError(ModelFileError):
    pass


class NotAModelError(ModelFileError):
    pass


class UnsupportedVersionError(ModelFileError):
    pass


class TruncatedFileError(ModelFileError):
    pass


class CorruptFileError(ModelFileError):
    pass


class UnsupportedTypeError(ModelFileError):
    pass


class VocabularyError(ModelFileError):
    pass


class TensorError(QuantscopeError):
    pass


class MissingTensorError(TensorError):
    pass


class ShapeError(TensorError):
    pass


class NonFiniteError(TensorError):
    pass


class BlockError(TensorError):
    pass


class UnsupportedArchitectureError(QuantscopeError):
    pass


class UnsupportedFeatureError(QuantscopeError):
    pass


class StudyFolderError(QuantscopeError):
    pass


class StudyLockedError(StudyFolderError):
    pass


class StudyMismatchError(StudyFolderError):
    pass


class StudyFormatError(StudyFolderError):
    pass


class StudyDamagedError(StudyFolderError):
    pass


class StudyDiskError(StudyFolderError):
    pass


class ClusterError(QuantscopeError):
    pass


class EngineError(QuantscopeError):
    pass


class TraceError(QuantscopeError):
    pass


class TraceFormatError(TraceError):
    pass


class TraceContentError(TraceError):
    pass


class TraceMismatchError(TraceError):
    pass


class ImportFormatError(QuantscopeError):
    pass


class MissingExtraError(QuantscopeError):
    pass
