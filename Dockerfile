# syntax=docker/dockerfile:1
FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin holdfast && cp target/release/holdfast /holdfast

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home holdfast
COPY --from=build /holdfast /usr/local/bin/holdfast
# In a container, loopback reaches nobody, so Holdfast listens on every address. Who reaches port 6380 may sell: it refuses to start so
# until HOLDFAST_INSECURE=true says that only your services reach it, as compose.yaml does.
ENV HOLDFAST_LISTEN=0.0.0.0:6380 \
    HOLDFAST_HTTP_LISTEN=0.0.0.0:9380
EXPOSE 6380 9380
USER 10001
HEALTHCHECK --interval=5s --timeout=2s --start-period=10s CMD ["/usr/local/bin/holdfast", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/holdfast"]
CMD ["serve"]
