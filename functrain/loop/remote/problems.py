"""What an error of remote storage means, in words that hold no credentials."""

import re

from functrain.errors import StorageError
from functrain.loop.remote.address import Address

_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "az": "AZURE_ENDPOINT"}
_CREDENTIALS = re.compile(
    r"InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|InvalidToken|ExpiredToken|AuthenticationFailed|"
    r"AuthorizationFailure|PermissionDenied|Unauthenticated|code: 40[13]\b"
)
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
_NO_CREDENTIALS = re.compile(r"169\.254\.|metadata\.google|MissingCredentials|token request")
_REQUEST = re.compile(r"(?:error sending request|error decoding response body|operation timed out|TimedOut)")


def is_passing(error: Exception) -> bool:
    """Whether a request that failed may well succeed when it is made again."""
    text = str(error)
    return (
        "TimedOut" in text
        or bool(_REQUEST.search(text))
        or re.search(r"code: (?:50[0234]|408|429)\b", text) is not None
    )


def is_of_bucket(error: Exception) -> bool:
    """Whether it is the bucket that is not there, rather than the object."""
    return _NO_BUCKET.search(str(error)) is not None


def told(error: Exception, what: str, address: Address, patience: float) -> StorageError:
    """The error that says what could not be done, why, and what to do.

    Args:
      error: of obstore, which shows addresses with all that is in them, and answers of servers.
      what: what was done: "list 's3://bucket/digits'".
      address: where.
      patience: seconds for which it was tried again.
    """
    why, instead = _why(error, address, patience)
    return StorageError(f"could not {what}: {why}; {instead}")


def _why(error: Exception, address: Address, patience: float) -> tuple[str, str]:
    text, kind = str(error), type(error).__name__
    place = "container" if address.scheme == "az" else "bucket"
    variables = _VARIABLES.get(address.scheme, "the credentials")
    answer = _answer(text)
    if is_of_bucket(error):
        return f"there is no {place} {address.bucket!r}{answer}", f"make it, or mend the address {str(address)!r}"
    if "MissingAccount" in text or "Account must be specified" in text:
        return "it is not said whose account it is", "set AZURE_STORAGE_ACCOUNT_NAME in the environment"
    if _NO_CREDENTIALS.search(text):
        return "there are no credentials in the environment", f"set {variables}"
    if _CREDENTIALS.search(text) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return f"the credentials are refused{answer}", f"set {variables} to those of who may do so"
    if "BadScheme" in text:
        return "the endpoint is no https", "for http set AWS_ALLOW_HTTP=true in the environment"
    if address.scheme == "file":
        return _first_line(text), "mend that, or give another place"
    endpoint = _ENDPOINTS.get(address.scheme)
    again = "mend that and try again" + (f"; {endpoint} says another server" if endpoint else "")
    if "TimedOut" in text or "operation timed out" in text:
        return f"there was no answer in time, tried for {patience:g} s", again
    if "Connect" in text:
        return f"nobody answers: no connection{_host(text)}, tried for {patience:g} s", again
    return f"{_first_line(text)}{answer}", again


def _host(text: str) -> str:
    """The server of a request, without anything that may be secret."""
    found = re.search(r"https?://(?:[^/@\s]*@)?([^/?\s,]+)", text)
    return f" to {found[1]}" if found else ""


def _answer(text: str) -> str:
    """What a server answered: its status and its code."""
    status = re.search(r"status code: (\d{3}(?: [A-Z][A-Za-z ]*)?)", text)
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    found = [match[1].strip() for match in (status, code) if match]
    return f" ({', '.join(found)})" if found else ""


def _first_line(text: str) -> str:
    """What obstore says, without what servers answer, and without the rest of what addresses hold."""
    line = (text.strip().splitlines() or ["no reason is given"])[0].partition(" - Server returned")[0]
    line = re.sub(r"(https?://)[^/@\s]*@", r"\1", line)
    return re.sub(r"\?\S+", "", line)[:300]
