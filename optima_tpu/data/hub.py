"""Files of data sets on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from optima_tpu.errors import UserError


def download(repository: str, name: str) -> Path:
    """The local path of one file of a data set, downloaded into the hub's own cache where it isn't yet.

    Raises:
      UserError: the file is not in the cache and the hub can't be reached or refuses it.
    """
    cached = try_to_load_from_cache(repository, name, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        # hf_hub_download alone retries for half a minute where there is no network; this asks once.
        get_hf_file_metadata(hf_hub_url(repository, name, repo_type="dataset"))
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # the HTTP library below has exceptions of its own, and another name in every version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} of the data set {repository} is not in the hub's cache and can't be downloaded "
                        f"({reason}): download the file elsewhere with `hf download --repo-type dataset {repository} "
                        f"{name}` and give it as file:PATH") from error
