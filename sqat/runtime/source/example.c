// Serving a file of target cpu-sparse from C: ONNX Runtime as ever, with one more line.
//
//     gcc example.c -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o example
//     ./example model.onnx $(python -c 'from sqat import runtime; print(runtime.library())')
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>

static const OrtApi* ort;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
  exit(1);
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  ort = OrtGetApiBase()->GetApi(17);
  OrtEnv* environment;
  OrtSessionOptions* options;
  OrtSession* session;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "example", &environment));
  check(ort->CreateSessionOptions(&options));
  check(ort->RegisterCustomOpsLibrary_V2(options, arguments[2]));  // the one line
  check(ort->CreateSession(environment, arguments[1], options, &session));

  int64_t ids[] = {101, 7592, 2088, 102}, mask[] = {1, 1, 1, 1}, shape[] = {1, 4};
  OrtMemoryInfo* memory;
  OrtValue *inputs[2], *output = NULL;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  const ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  check(ort->CreateTensorWithDataAsOrtValue(memory, ids, sizeof ids, shape, 2, type, &inputs[0]));
  check(ort->CreateTensorWithDataAsOrtValue(memory, mask, sizeof mask, shape, 2, type, &inputs[1]));

  OrtAllocator* allocator;
  char* name;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->SessionGetOutputName(session, 0, allocator, &name));
  const char* input_names[] = {"input_ids", "attention_mask"};
  const char* output_names[] = {name};
  check(ort->Run(session, NULL, input_names, (const OrtValue* const*)inputs, 2, output_names, 1, &output));
  float* values;
  check(ort->GetTensorMutableData(output, (void**)&values));
  printf("%s begins with %f\n", name, values[0]);
  return 0;
}
