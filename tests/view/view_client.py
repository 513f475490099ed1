"""A client of the pages' server in this process, and small directories of runs for it."""

import json

from starlette.testclient import TestClient

from flowgrain.view import Catalog, catalog, create_app

LOCAL = "http://127.0.0.1:7860"


def client_of(*folders, base_url=LOCAL, **options):
    """A client of a server that shows `folders`. An error in the server fails the test."""
    return TestClient(create_app(Catalog(folders), **options), base_url=base_url)


def get(client, path, status=200):
    """The JSON at `path`."""
    answer = client.get(path)
    assert answer.status_code == status, (path, answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.content, parse_constant=_no_constant)


def _no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def check_again(monkeypatch):
    """Let the server look at the files at every request, and not at most once a second."""
    monkeypatch.setattr(catalog, "REFRESH_SECONDS", 0)
