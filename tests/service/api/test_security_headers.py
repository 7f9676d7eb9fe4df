from fastapi.testclient import TestClient

PATH = "/v1/images/generations"


def test_every_answer_has_the_security_headers(small: TestClient) -> None:
    for response in (
        small.get("/healthz"),
        small.get("/docs"),
        small.get("/nowhere"),
        small.post(PATH, json={"prompt": "a"}),
        small.post(PATH, json={"prompt": "break"}),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"
    assert small.get("/page").headers["referrer-policy"] == "origin"  # a header that the route has set


def test_data_loads_nothing_and_pages_load_only_their_own_files(small: TestClient) -> None:
    assert small.get("/healthz").headers["content-security-policy"].startswith("default-src 'none'")
    page = small.get("/page").headers["content-security-policy"]
    assert "script-src 'self' 'unsafe-inline'" in page
    for response in (small.get("/healthz"), small.get("/page")):
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def test_answers_of_the_api_are_not_cached(small: TestClient) -> None:
    for response in (small.get("/v1/jobs/a"), small.post(PATH, json={"prompt": "a"})):
        assert response.headers["cache-control"] == "no-store"
    assert "cache-control" not in small.get("/healthz").headers
