"""Credentials in any form of URL are recognised and left out; ordinary paths, URLs and settings are not mistaken."""

from pathlib import Path

import pytest

from zpipe.pipeline.open_source import NAMED
from zpipe.pipeline.teacher import TeacherSpec
from zpipe.schemas.errors import UsageError
from zpipe.schemas.secrets import holds_secret, redacted, refuse_secret
from zpipe.schemas.storage import as_local, as_path
from zpipe.train.fit.train_vit import VitConfig

CANARY = "cAnArY7"
SECRET = [
    # before an @
    f"s3://KEY:{CANARY}@bucket/x",
    f"https://user:{CANARY}@h/x",
    f"https://:{CANARY}@h",
    f"http://{CANARY}@h",
    f"gs://{CANARY}@b/x",
    f"ftp://u:{CANARY}@h/x",
    f"hf://user:{CANARY}@datasets/x",
    f"ssh://u:{CANARY}@h/x",
    f"git+https://{CANARY}@h/x",
    f"ray://u:{CANARY}@h:10001",
    f"jdbc:postgresql://u:{CANARY}@h/x",
    f"file://u:{CANARY}@h/x",
    f"abfss://account:{CANARY}@account.dfs.core.windows.net/x",
    f"hdfs://user:{CANARY}@namenode:8020/x",
    f"https://u:{CANARY}@[::1]/x",
    f"HTTPS://user:{CANARY}@h/x",
    f"S3://k:{CANARY}@b/x",
    # with what ends a host
    f"https://u:ab/{CANARY}@h/x",
    f"https://u:a#{CANARY}@h/x",
    f"https://u:a {CANARY}@h/x",
    f"https://u:\n{CANARY}@h/x",
    # queries, fragments and parameters
    f"https://h/x?Signature={CANARY}",
    f"https://h/x?{CANARY}",
    f"s3://b/x?X-Amz-Signature={CANARY}",
    f"s3://b/x?versionId={CANARY}",
    f"az://c/x?sv=2020&sig={CANARY}",
    f"gs://b/x?X-Goog-Signature={CANARY}",
    f"https://[::1]:80/x?t={CANARY}",
    f"https://h/x#access_token={CANARY}",
    f"https://h/x#{CANARY}",
    f"https://h/x;token={CANARY}",
    # chains
    f"simplecache::s3://k:{CANARY}@b/x",
    f"zip://a.tar::https://u:{CANARY}@h/x",
    f"filecache::https://h/x?sig={CANARY}",
    # encoded
    f"https://u%3A{CANARY}%40h/x",
    f"https://u%253A{CANARY}%2540h/x",
    f"https%3A%2F%2Fu:{CANARY}@h/x",
    f"https://h/x%3Fsig={CANARY}",
    # as pathlib, shells and people leave them
    f"https:/u:{CANARY}@h/x",
    f"https:/h/x?sig={CANARY}",
    f"https:u:{CANARY}@h/x",
    f"https:\\\\u:{CANARY}@h/x",
    f" https://u:{CANARY}@h/x",
    f"//u:{CANARY}@h/x",
    f"user:{CANARY}@h:x",
    # inside of other texts
    f"init_from=https://u:{CANARY}@h/x",
    f"--init-from=https://u:{CANARY}@h/x",
    f"cifar10:https://u:{CANARY}@h/x",
    f"timm:https://u:{CANARY}@h/x",
    f"a,https://u:{CANARY}@h",
    f'{{"a": ["https://u:{CANARY}@h"]}}',
    # connection strings
    f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={CANARY};EndpointSuffix=core.windows.net",
    f"BlobEndpoint=https://x.blob.core.windows.net;SharedAccessSignature=sv=2&sig={CANARY}",
    f"host=h password={CANARY}",
    f"AWS_SECRET_ACCESS_KEY={CANARY}",
    f"token={CANARY}",
]
ORDINARY = [
    "s3://bucket/a/b.tar",
    "s3://bucket/@eaDir/a@b.tar",
    "https://h:8080/a@b.tar",
    "http://[::1]:80/x",
    "abfss://container@account.dfs.core.windows.net/x",
    "hdfs://user@namenode:8020/x",
    "memory://x/y",
    "ray://h:10001",
    "127.0.0.1:6379",
    "/home/me@work/x",
    "a?b=c.jpg",
    "folder#1/x.tar",
    "file:///tmp/a?b#c.jpg",
    "./2024:05@home",
    "cifar10:/home/me@work/x",
    "hf-hub:timm/vit@main",
    "hf-hub:vit@main",
    "timm:vit_tiny_patch16_224.augreg",
    "class:5",
    "300 tokens",
    "class_token=true",
    "reg_tokens=4",
    "global_pool=token",
    'model_args={"class_token": true}',
    "train.opt=muon",
    "s3://b/x::http://127.0.0.1:9/y",
]


@pytest.mark.parametrize("text", SECRET)
def test_texts_with_credentials(text):
    assert holds_secret(text)
    with pytest.raises(UsageError, match="carries credentials or a query") as error:
        refuse_secret(text)
    assert CANARY not in str(error.value)
    for function in (as_path, as_local):
        with pytest.raises(UsageError) as error:
            function(text)
        assert CANARY not in str(error.value)


@pytest.mark.parametrize("name", NAMED)
def test_an_at_sign_in_the_path_of_a_source_is_no_password(name):
    refuse_secret(f"{name}:data/me@work/x")
    refuse_secret(f"{name}:me@work")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts(text):
    refuse_secret(text)
    assert redacted(f"{text}: can't be read") == f"{text}: can't be read"


def test_a_message_that_quotes_credentials_loses_them():
    said = redacted(f"can't connect to 'https://u:{CANARY}@h/x' (see https://h/docs); AccountKey={CANARY} is wrong")
    assert said == "can't connect to 'https://... (see https://h/docs); AccountKey=... is wrong"
    for text in SECRET:
        if " " not in text.strip() and "\n" not in text:
            assert CANARY not in redacted(f"{text}: not found")


def test_python_callers_are_refused_as_well():
    for make in (
        lambda: VitConfig(init_from=f"https://u:{CANARY}@h/x"),
        lambda: VitConfig(model_args={"a": [f"s3://k:{CANARY}@b"]}),
        lambda: TeacherSpec(weights=f"s3://b/x?sig={CANARY}"),
        lambda: as_path(Path(f"https://u:{CANARY}@h/x")),
    ):
        with pytest.raises(UsageError) as error:
            make()
        assert CANARY not in str(error.value)


def test_a_url_where_only_a_path_can_be_is_called_one():
    for make in (lambda: as_local("s3://b/x"), lambda: TeacherSpec(weights="s3://b/x").path):
        with pytest.raises(UsageError, match="s3://b/x: a URL is not supported here; give a local path"):
            make()


def test_schemes_in_capitals_are_the_same():
    assert str(as_path("MEMORY://x/y")) == "memory://x/y" and as_path("FILE:///tmp/x") == Path("/tmp/x")
