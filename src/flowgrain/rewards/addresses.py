"""Addresses of reward servers in settings."""

from flowgrain.rewards.options import OptionError


def check_url(url: str, example: str) -> str:
    """`url` without a slash at the end.

    Raises:
        OptionError: `url` is not an HTTP address. The message contains `example`.
    """
    if not url.startswith(("http://", "https://")):
        raise OptionError(f"url={url}: not an HTTP address. Write an address such as {example}.")
    return url.rstrip("/")


def check_urls(urls: str | list[str], example: str) -> list[str]:
    """The addresses `urls`, each without a slash at the end.

    Raises:
        OptionError: there is none, one occurs twice, or one is not an HTTP address.
    """
    checked = [check_url(url, example) for url in ([urls] if isinstance(urls, str) else urls)]
    if not checked:
        raise OptionError(f"url=[]: there is no address. Write at least one, such as {example}.")
    for url in checked:
        if checked.count(url) > 1:
            raise OptionError(f"url={url}: is listed twice. List every server once.")
    return checked
