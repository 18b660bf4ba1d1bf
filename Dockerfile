# The worker and its commands: `podman run IMAGE` is `qris-expire run`, `podman run IMAGE check` another command of it.
#
#   podman build --build-arg REVISION="$(git rev-parse HEAD)" --timestamp 0 --tag qris-expire-worker:0.1.0 .
#
# The base is not pinned here, since a digest written here would soon lack its security updates. For a release give the one that
# you tested, --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:…, and --no-cache: older buildahs take labels with last
# time's arguments from their cache.
ARG PYTHON_IMAGE=python:3.11-slim

# -- what both stages below have in common: Python without what installs packages, compiled once
FROM ${PYTHON_IMAGE} AS python
# With a read-only root every start would compile anew, and a SIGTERM would wait for that. Hash-based files need no
# modification times, so the layer is the same each time it is built.
RUN python -m compileall -q -j 1 --invalidation-mode unchecked-hash -x '/(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|site-packages)/' "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

# -- dependencies: a layer that changes only with requirements.txt
FROM python AS dependencies
COPY requirements.txt /src/
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --no-compile --only-binary :all: --require-hashes -r /src/requirements.txt \
 && python -m compileall -q -j 1 --invalidation-mode unchecked-hash /opt/venv/lib

# -- the project: a small layer on top
FROM dependencies AS project
COPY requirements-build.txt /src/
RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action ignore --only-binary :all: --require-hashes -r /src/requirements-build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY worker /src/worker
COPY .ci/sbom /src/sbom
# --root keeps the new files apart from the dependencies, at the path where they will be.
RUN python -m pip wheel --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /wheels /src \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --no-deps --no-index --no-compile --root /project /wheels/*.whl \
 && python -m compileall -q -j 1 --invalidation-mode unchecked-hash -s /project /project \
 && python /src/sbom /project/opt/venv/share/qris-expire-worker /opt/venv/lib/python3*/site-packages /project/opt/venv/lib/python3*/site-packages \
 && mkdir -p /project/var/lib/qris-expire

# -- what runs
FROM python AS runtime
# Nothing that installs packages is left in the container.
RUN python -m pip uninstall --quiet --yes --root-user-action ignore pip setuptools wheel \
 && rm -rf "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')"
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /project/opt/venv /opt/venv
# Journals of sweeps; mount a volume here.
COPY --from=project --chown=10001:10001 /project/var/lib/qris-expire /var/lib/qris-expire
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_STATE_HOME=/var/lib
# An image that cannot start is not built, for instance on a base without libstdc++6, which greenlet needs; Debian's images
# have it.
RUN ["python", "-c", "import worker.service"]
# A number, or Kubernetes cannot see that it is not root.
USER 10001:10001
WORKDIR /var/lib/qris-expire
EXPOSE 9108
STOPSIGNAL SIGTERM
# The worker itself is process 1 and gets the signals: no shell, no init. It starts no children but its own workers.
ENTRYPOINT ["/opt/venv/bin/qris-expire"]
CMD ["run"]

ARG PYTHON_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="qris-expire-worker" \
      org.opencontainers.image.description="Expires QRIS bill numbers at a SNAP payment gateway, driven by RabbitMQ" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}" \
      qris-expire.sbom="/opt/venv/share/qris-expire-worker/sbom.cdx.json" \
      qris-expire.licences="/opt/venv/share/qris-expire-worker/licences.txt"
