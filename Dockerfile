# syntax=docker/dockerfile:1
FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin holdfast && cp target/release/holdfast /holdfast

# Has the certificates of public authorities, no shell, and a user that is not root.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /holdfast /usr/local/bin/holdfast
# In a container, loopback reaches nobody, so Holdfast listens on every address. Who reaches port 6380 may sell, which HOLDFAST_INSECURE
# permits: publish the port on 127.0.0.1 only, or keep it in a network to which nothing but your services is joined.
ENV HOLDFAST_LISTEN=0.0.0.0:6380 \
    HOLDFAST_HTTP_LISTEN=0.0.0.0:9380 \
    HOLDFAST_INSECURE=true
EXPOSE 6380 9380
USER nonroot
HEALTHCHECK --interval=5s --timeout=2s --start-period=10s CMD ["/usr/local/bin/holdfast", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/holdfast"]
CMD ["serve"]
