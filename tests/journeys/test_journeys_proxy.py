"""The counting proxy before a real S3 store: counts, signatures, shaping, death."""

import time
import urllib.error
import urllib.request

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import EndpointConnectionError
from testbed.processes import Stage
from testbed.servers import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    ObjectStore,
    start_proxy,
)

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


def s3(endpoint: str):
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"max_attempts": 1},
            connect_timeout=2,
        ),
    )


def fetch(url: str, span: str) -> bytes:
    request = urllib.request.Request(url, headers={"Range": f"bytes={span}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return answer.read()


def test_presigned_ranges_pass_and_are_counted(stage: Stage, object_store: ObjectStore) -> None:
    proxy = start_proxy(stage, object_store.endpoint)
    client = s3(proxy.endpoint)
    body = bytes(range(256)) * 400
    client.put_object(Bucket=BUCKET, Key="images/a b+c/\u00e9%", Body=body)
    url = client.generate_presigned_url(
        "get_object", Params={"Bucket": BUCKET, "Key": "images/a b+c/\u00e9%"}
    )
    proxy.reset()
    assert fetch(url, "256-511") == bytes(range(256))
    assert proxy.counters()["ranges"] == {"requests": 1, "bytes": 256, "errors": 0}
    assert client.get_object(Bucket=BUCKET, Key="images/a b+c/\u00e9%")["Body"].read() == body
    assert proxy.counters()["objects"] == {"requests": 1, "bytes": len(body), "errors": 0}
    client.list_objects_v2(Bucket=BUCKET)
    client.head_object(Bucket=BUCKET, Key="images/a b+c/\u00e9%")
    client.delete_object(Bucket=BUCKET, Key="images/a b+c/\u00e9%")
    assert proxy.counters()["control"]["requests"] == 3
    with pytest.raises(urllib.error.HTTPError):
        fetch(url, "0-1")
    assert proxy.counters()["ranges"]["errors"] == 1


def test_a_delay_and_a_bandwidth_are_kept(stage: Stage, object_store: ObjectStore) -> None:
    s3(object_store.endpoint).put_object(Bucket=BUCKET, Key="k", Body=bytes(200_000))
    proxy = start_proxy(stage, object_store.endpoint, first_byte_ms=100, bytes_per_second=1_000_000)
    url = s3(proxy.endpoint).generate_presigned_url(
        "get_object", Params={"Bucket": BUCKET, "Key": "k"}
    )
    begin = time.monotonic()
    assert len(fetch(url, "0-199999")) == 200_000
    # A lower bound that the shaper promises, not a race: 100 ms and 200 kB at 1 MB/s.
    assert time.monotonic() - begin >= 0.25


def test_a_killed_proxy_is_gone_at_once(stage: Stage, object_store: ObjectStore) -> None:
    proxy = start_proxy(stage, object_store.endpoint)
    client = s3(proxy.endpoint)
    client.list_objects_v2(Bucket=BUCKET)
    proxy.process.kill()
    with pytest.raises(EndpointConnectionError):
        client.list_objects_v2(Bucket=BUCKET)


def test_a_dead_store_is_502_and_the_proxy_lives(stage: Stage, object_store: ObjectStore) -> None:
    proxy = start_proxy(stage, object_store.endpoint)
    object_store.process.kill()
    with pytest.raises(urllib.error.HTTPError, match="502"):
        fetch(f"{proxy.endpoint}/{BUCKET}/k", "0-1")
    assert proxy.counters()["ranges"]["errors"] == 1
