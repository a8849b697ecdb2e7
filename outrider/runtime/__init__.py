"""Foundation of every program: main function, gRPC server, channel settings, status of errors.

`main` runs a program. `grpc_server` owns port, health and shutdown. `interceptors`,
`server_security` and `client_identity` control access. `grpc_status` maps errors to status codes.
`grpc_streams`, `heartbeat`, `message_limits` and `protobuf` serve the streams between tiers.
"""
