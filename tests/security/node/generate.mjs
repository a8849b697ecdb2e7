// One Generate call by a client that knows nothing of Outrider but its .proto files.
//
// node generate.mjs ENDPOINT PROTO_FOLDER [CA_FILE], the request as JSON on standard input, a key in
// the variable OUTRIDER_API_KEY. Prints {"code", "details", "messages"}: the call's status and all
// that it sent, field names as in the .proto files.

import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [endpoint, protoFolder, caFile] = process.argv.slice(2);
const key = process.env.OUTRIDER_API_KEY;
const request = JSON.parse(readFileSync(0, "utf8"));

const definition = protoLoader.loadSync("outrider/v1/orchestrator.proto", {
  includeDirs: [protoFolder],
  keepCase: true,
  enums: String,
  longs: String,
});
const { OrchestratorService } = grpc.loadPackageDefinition(definition).outrider.v1;

const credentials = caFile
  ? grpc.credentials.createSsl(readFileSync(caFile))
  : grpc.credentials.createInsecure();
const client = new OrchestratorService(endpoint, credentials);
const metadata = new grpc.Metadata();
if (key) metadata.set("authorization", `Bearer ${key}`);

const messages = [];
const deadline = new Date(Date.now() + 120_000);
const call = client.Generate(request, metadata, { deadline });
call.on("data", (message) => messages.push(message));
call.on("error", () => {}); // its status says the same
call.on("status", ({ code, details }) => {
  console.log(JSON.stringify({ code: grpc.status[code], details, messages }));
  client.close();
});
