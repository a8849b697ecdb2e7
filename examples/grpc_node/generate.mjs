// Stream one generation over gRPC from Node: npm install, then node generate.mjs [ENDPOINT].
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const options = { includeDirs: [new URL("../../proto", import.meta.url).pathname], keepCase: true };
const definition = protoLoader.loadSync("outrider/v1/orchestrator.proto", options);
const { OrchestratorService } = grpc.loadPackageDefinition(definition).outrider.v1;

const client = new OrchestratorService(process.argv[2] ?? "127.0.0.1:50051", grpc.credentials.createInsecure());
const call = client.Generate({ text: "def fibonacci(n):", sampling: { temperature: 0, max_tokens: 60 } });
call.on("data", ({ text, result }) => {
  process.stdout.write(text ?? "");
  if (result) console.log(`\n\nacceptance rate: ${result.speculation.acceptance_rate ?? 0}`);
});
call.on("error", (error) => { console.error(error.message); process.exitCode = 1; });
call.on("end", () => client.close());
