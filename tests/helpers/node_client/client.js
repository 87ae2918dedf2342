// Asks for variants 0 and 1 of an image file and prints them as JSON. Usage: node client.js PROTO ADDRESS IMAGE
"use strict";

const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const { blake2b } = require("blakejs");

const [proto, address, imagePath] = process.argv.slice(2);
const definition = loader.loadSync(proto, { keepCase: true, enums: String, longs: String, defaults: true });
const { GenerationService } = grpc.loadPackageDefinition(definition).genssl.generation.v1;
const client = new GenerationService(address, grpc.credentials.createInsecure());

function call(method, request) {
  const deadline = new Date(Date.now() + 30000);
  return new Promise((resolve, reject) => {
    client[method](request, { deadline }, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

async function main() {
  const info = await call("GetServerInfo", {});
  const generator = (await call("ListGenerators", {})).generators[0];
  const data = fs.readFileSync(imagePath);
  const digest = Buffer.from(blake2b(data, undefined, 16));
  const request = {
    generator_id: generator.generator_id,
    expected_fingerprint: generator.fingerprint,
    sources: [{ digest }],
    variants: [
      { source_index: 0, variant_index: 0 },
      { source_index: 0, variant_index: 1 },
    ],
    client_id: "node",
  };
  const first = await call("GenerateVariants", request);
  let answer = first;
  if (first.missing_digests.length > 0) {
    request.sources[0].data = data;
    request.sources[0].encoding = "IMAGE_ENCODING_FILE";
    answer = await call("GenerateVariants", request);
  }
  process.stdout.write(
    JSON.stringify({
      version: info.version,
      first: first.variants.map((variant) => variant.status.code),
      variants: answer.variants.map((variant) => ({
        status: variant.status.code,
        origin: variant.origin,
        shape: [variant.channels, variant.height, variant.width],
        data: variant.data.toString("base64"),
      })),
    })
  );
  client.close();
}

main().catch((error) => {
  process.stderr.write(String(error) + "\n");
  process.exit(1);
});
