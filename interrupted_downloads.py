"""Says which file of which repository is missing when a download breaks off.

Errors of the HTTP client pass through huggingface_hub and transformers as they are: they name neither, and not every
one of them is an `OSError`. What is not yet in the cache afterwards tells.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .language_model_source import LanguageModelSource


@contextmanager
def explain_interrupted_download(name: str | None, language_model: str | None = None, **options):
    """
    Turns errors of connections into one line that says what to do. Other errors, of anything, are left as they are.

    Args:
        name (`str`): Repository or folder whose weights are loaded meanwhile.
        language_model (`str`, *optional*): Where its language model is taken from, instead of where its configuration
            says.
        options: How files of the repository are fetched; of these `revision`, `subfolder` and `cache_dir` matter.

    Raises:
        OSError: for an interrupted download.
    """
    try:
        yield
    except (OSError, ValueError):
        raise  # these say what is wrong
    except Exception as error:
        names = ("cache_dir", "revision", "subfolder")
        options = {key: options[key] for key in names if options.get(key) is not None}
        missing = name and next(_find_missing_files(os.fspath(name), language_model, options), None)
        if not missing:
            raise
        repository, file_name = missing
        raise OSError(
            f"{repository}: the download of {file_name} was interrupted ({error}); check the connection and run the "
            "same again, what is there already is kept"
        ) from error


def _find_missing_files(name: str, language_model: str | None, options: dict) -> Iterator[tuple[str, str]]:
    """Repository and name of each weight file that is not in the cache, the language model's after its own."""
    cache = {key: value for key, value in options.items() if key == "cache_dir"}

    def find(repository, file_name, options):
        return cached_file(
            repository,
            file_name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )

    def find_missing(repository, options):
        if os.path.isdir(repository):
            return
        index_file = find(repository, SAFE_WEIGHTS_INDEX_NAME, options)
        file_names = [SAFE_WEIGHTS_NAME]
        if index_file is not None:
            with open(index_file, encoding="utf-8") as file:
                file_names = sorted(set(json.load(file)["weight_map"].values()))
        for file_name in file_names:
            if find(repository, file_name, options) is None:
                yield repository, file_name

    yield from find_missing(name, options)
    config, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True, **options)
    language_model = language_model or config.get("language_model_name_or_path")
    if language_model is not None:
        source = LanguageModelSource.parse(language_model)
        options = {"revision": config.get("language_model_revision") or source.revision, **cache}
        if source.gguf_file is None:
            yield from find_missing(source.name, options)
        elif find(source.name, source.gguf_file, options) is None:
            yield source.name, source.gguf_file


__all__ = ["explain_interrupted_download"]
